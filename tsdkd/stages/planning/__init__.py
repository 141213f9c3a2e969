"""What a chain of commands will take: the models' shapes, what each line leaves for the next, a measured roofline."""
