"""Files for clusters: Kubernetes manifests, a SLURM batch script, a Grafana dashboard. No code."""
