"""The Xen PV interface: a hypervisor for guests that run with kernel and programs alike in ring 3.

Its truth is Xen's public interface (xen/include/public): structures, numbers and errors are as told there.
"""
