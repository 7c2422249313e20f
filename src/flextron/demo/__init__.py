"""The tour: quickstart and its report."""
