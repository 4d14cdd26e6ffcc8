"""liif_fast inside other programs: the public LIIF code, hosts and hubs."""
