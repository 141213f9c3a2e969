"""Tasks that run side by side: in processes of this machine, or on the nodes of a Ray cluster."""
