"""The bins of edges, under their names in D-FINE's adapter."""

from detr_fast.integrations.edge_distributions import bins_of, weighting

__all__ = ["bins_of", "weighting"]
