"""A sweep's figures. Each module draws one kind, from `report.comparison`, in one style."""
