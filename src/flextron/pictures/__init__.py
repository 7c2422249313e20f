"""Draw sub-networks and the compute of each token, as text, web page and picture."""
