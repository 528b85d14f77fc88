"""Prefixes of variables in a training program that are no part of the model."""

from __future__ import annotations

# PaddleSlim's prefix of the teacher's variables in the program into which it merges teacher and student.
TEACHER_PREFIX = "teacher_"
# Prefix of the variables of `compress.qat.detection_loss`.
LOSS_PREFIX = "detection_loss/"
