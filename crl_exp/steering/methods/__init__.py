"""Methods: how what will be evaluated comes about. One dataclass and one YAML file each."""
