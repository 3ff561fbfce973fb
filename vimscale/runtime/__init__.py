"""What every rank needs: its place among the ranks, its heartbeat, its run folder, sealed manifests."""
