"""What `rho.integrations.torchtitan` needs of torchtitan 0.3, for machines that can not install it."""
