"""What a chain of commands will take: shapes of models, what each line leaves for the next, a measured roofline."""
