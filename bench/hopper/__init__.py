"""Measurements of wgmma, bulk copies and multicast that guide the design of a Hopper kernel; not yet run on a GPU."""
