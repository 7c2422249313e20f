"""A wish becomes a Subnet: by name, by budget, or by another method to compare with."""
