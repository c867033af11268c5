"""Pipelines that are copied into exported folders; each imports only torch and diffusers."""
