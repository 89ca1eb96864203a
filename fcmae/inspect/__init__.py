"""Looking at what was learned: frozen features, probes, diversity, reconstructions, reports."""
