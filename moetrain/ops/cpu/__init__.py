"""What is faster on a CPU: products through oneDNN, experts one by one."""
