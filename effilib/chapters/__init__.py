"""What a notebook shows beyond its method: arms, tables and figures of one chapter, a module each."""
