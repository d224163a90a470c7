"""whimbrel-rdma."""
