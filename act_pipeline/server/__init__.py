"""A server of the versions of a repository: Triton for KServe, a page, metrics; `serving` watches and rolls back."""
