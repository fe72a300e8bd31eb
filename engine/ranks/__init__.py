"""Tensor parallelism (arXiv 1909.08053): the processes that compute a sharded model together, and their channels.

A *rank* is a process with its shard of the models. Rank 0 is the engine process itself: it schedules, samples and
drafts, and is the *leader* (`leader`), which sends every pass to the others before it computes its own shard. A rank
above 0 is a *worker* process (`worker`), which runs a *follower* (`follower`): it has no sequences and computes the
passes that it receives. A *node* is a host; on every host but the leader's a parent process (`node`) holds the workers.

Two channels connect them, beside the tensors' own (`torch_group`). The *pass channel* (`channel`) carries orders and
batches from the leader to all followers. The *control channel* is for starting, watching and ending; its ends
are the leader's *watch* (`watch`), which determines the rank that failed (`peers`), and a *link* (`link`) in every
other process. Both run in threads of their own, even while a pass runs or hangs. The messages are in `wire`.
"""
