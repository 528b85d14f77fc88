"""A model with everything that its target machine needs, in one file; no Paddle and no part of this package there."""

from act_pipeline.bundle.make import Bundle, BundleRequest, make_bundle

__all__ = ["Bundle", "BundleRequest", "make_bundle"]
