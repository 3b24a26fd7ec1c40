"""One file a task; its name is the name of its yaml in conf/task.

ON_RANKS says whether it needs an engine. check(config) refuses, before any rank is started, what can be known then.
run(config, engine) (or run(config) where ON_RANKS is False) does the work on rank 0 and returns the exit code.
A task whose STARTS_JOBS is True has no ranks either and starts jobs that do: run(config, run_job), a
mmdist.launch.JobRunner. A task on ranks may open its engine itself (open_engine(config, tp, backend)), and give the
other ranks more to do than the engine does (follow(config, engine), which ends when rank 0 stops the engine). One whose
NEEDS_FOLDER is False makes an output folder only where output_dir= names one.
"""
