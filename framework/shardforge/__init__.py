"""ShardForge: distributed pretraining where the mesh changes and the model does not."""

__version__ = "0.1.0"
