"""Machines that live for one action: the hypervisor port, its backends, templates and clones."""
