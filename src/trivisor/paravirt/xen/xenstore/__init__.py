"""The store in which a domain and its back ends find each other: the tree, its protocol, and the ring it comes by.

Xen, docs/misc/xenstore.txt and xenstore-ring.txt; io/xs_wire.h.
"""
