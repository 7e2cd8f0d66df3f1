"""Adapters in diffusers: trained ones in its own classes, its own ones here, and the rest inside its stock pipelines."""
