"""Firecracker as a hypervisor: always under its jailer, spoken to over its API socket and vsock."""
