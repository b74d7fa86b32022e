"""Reading a task's rows, from the hub or from files, and drawing its splits by seed."""
