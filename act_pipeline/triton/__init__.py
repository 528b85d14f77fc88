"""A model as a repository for Triton Inference Server, and for OpenVINO Model Server."""

from act_pipeline.triton.make import BACKENDS, RepositoryRequest, TritonRepository, make_repository

__all__ = ["BACKENDS", "RepositoryRequest", "TritonRepository", "make_repository"]
