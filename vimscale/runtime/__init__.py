"""What every rank needs: the process group, its heartbeat, its run folder, sealed manifests.

May import recipe, model and storage; checkpoint, engine and everything above may import it. Everybody may import
`heartbeat`.
"""
