"""Run the series of notebooks and show what came of it: runner, jobs, cluster, reports, command line."""

__all__: list[str] = []  # import its modules: each needs what others do not
