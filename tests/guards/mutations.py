"""Ways to break what the most important tests guard: a few words of a file replaced, and the test that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old` stands exactly once in `file`; with `new` in its place the code breaks a promise, and `test` fails."""

    guards: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation(
        "A row is answered with its own task's lens, whoever shares its batch",
        "server/engine/engine.py",
        "per_row = features[transfer.send(np.array(trunk.index))]",
        "per_row = features[transfer.send(np.array(sorted(trunk.index)[::-1]))]",
        "tests/engine/test_isolation.py::test_every_composition_of_a_batch_gives_the_literal_answers",
    ),
    Mutation(
        "Padding of ragged prompts is masked",
        "server/engine/gathered.py",
        "return Prefix(keys, values, self._mask(layer))",
        "return Prefix(keys, values, None)",
        "tests/engine/test_isolation.py::test_every_composition_of_a_batch_gives_the_literal_answers",
    ),
    Mutation(
        "A seat that outlived its lens is noticed",
        "server/engine/rack.py",
        "if not slot.used or slot.generation != place.generation:",
        "if not slot.used:",
        "tests/engine/test_rack.py",
    ),
    Mutation(
        "A noisy task does not hold up a quiet one",
        "server/batching/fair_queue.py",
        "        turn.start += turn.step\n",
        "        pass\n",
        "tests/batching/test_batcher.py::test_a_noisy_task_does_not_hold_up_a_quiet_one",
    ),
    Mutation(
        "Rows that nobody waits for never reach the engine",
        "server/batching/scheduler.py",
        "served = row.deadline > now and not row.departed",
        "served = row.deadline > now",
        "tests/batching/test_batcher.py::test_departed_rows_never_reach_the_engine",
    ),
    Mutation(
        "A batch that fails is halved: the culprit alone gets the error",
        "server/batching/engine_thread.py",
        "            if len(rows) > 1:\n",
        "            if len(rows) > 10**9:\n",
        "tests/batching/test_batcher.py::test_the_culprit_alone_gets_the_error",
    ),
    Mutation(
        "An engine that hangs turns readiness off and its clients are answered",
        "server/batching/watchdog.py",
        "if thread.busy_s() > self._timeout_s:",
        "if False:",
        "tests/batching/test_watchdog.py::test_an_engine_that_hangs_is_told_and_everybody_is_answered",
    ),
    Mutation(
        "A late worker cannot touch the job of its successor",
        "server/jobs/lifecycle.py",
        'if job.state != "running" or job.attempt != attempt:',
        'if job.state != "running":',
        "tests/jobs/test_job_store.py::test_a_lease_expires_at_its_second_and_the_old_attempt_is_fenced",
    ),
    Mutation(
        "An alias moves only from where its mover saw it",
        "prompts_store/alias.py",
        "if expect is not ANY and expect != actual:",
        "if False:",
        "tests/prompts_store/test_stores.py::test_set_alias_counts_revisions_and_compares",
    ),
    Mutation(
        "Writers of a task take turns",
        "prompts_store/file_store.py",
        "                fcntl.flock(lock, fcntl.LOCK_EX)\n",
        "                pass\n",
        "tests/prompts_store/test_concurrent_stores.py::test_threads_lose_no_update",
    ),
    Mutation(
        "What is damaged in a store is never served",
        "prompts_store/bundle.py",
        "        if digest != version:\n",
        "        if False:\n",
        "tests/prompts_store/test_file_store.py::test_a_damaged_file_is_told_and_mended_by_putting_it_again",
    ),
    Mutation(
        "A file is whole and durable before it has its name",
        "prompts_store/durable_files.py",
        "            os.fsync(file.fileno())\n",
        "            pass\n",
        "tests/prompts_store/test_file_store.py::test_a_file_is_durable_before_it_has_its_name",
    ),
    Mutation(
        "The version before a damaged one goes on answering",
        "server/serving/resolver.py",
        "            return await self._fall_back(ref, key, alias, version, error)\n",
        "            raise\n",
        "tests/serving/test_quarantine.py::test_the_version_before_a_damaged_one_answers_and_says_so",
    ),
    Mutation(
        "A key sees only its own tasks",
        "server/api/tenancy.py",
        "        if not self.owns(task):\n            raise stored.TaskNotFound(task)\n        return self._inner\n",
        "        return self._inner\n",
        "tests/security/test_tenancy.py::test_no_route_tells_what_is_theirs_from_what_does_not_exist",
    ),
    Mutation(
        "An archive writes nowhere but into its data set",
        "server/datasets/formats/member_names.py",
        'if ".." in parts:',
        "if False:",
        "tests/security/test_archive_attacks.py",
    ),
    Mutation(
        "A checkpoint runs nothing: names beyond the closed list are refused",
        "server/importing/pickled.py",
        "        if full_name not in self._allowed:\n",
        "        if False:\n",
        "tests/security/test_checkpoint_attacks.py",
    ),
    Mutation(
        "A body is cut off at its cap while it is read",
        "server/api/middleware/body_limit.py",
        "        if self._got > self._cap:\n",
        "        if False:\n",
        "tests/api/test_api_http.py::test_each_route_has_its_cap",
    ),
    Mutation(
        "What is somebody else's costs the same work as what does not exist",
        "server/api/tenancy.py",
        "        if not job.task.startswith(self._tenant):",
        "        if not job.task.startswith(self._tenant) and self._inner.events(job_id) is not None:",
        "tests/security/test_tenancy.py::test_theirs_costs_the_same_work_as_what_does_not_exist",
    ),
    Mutation(
        "Whoever listens to a job does not outlive the key",
        "server/api/routes/train.py",
        "        await request.state.reauthorize(request.scope)\n",
        "",
        "tests/security/test_keys_http.py::test_whoever_listens_to_a_job_does_not_outlive_the_key",
    ),
    Mutation(
        "A client that leaves while its picture is decoded keeps nothing",
        "server/api/routes/predict.py",
        "            task.cancel()\n",
        "            pass\n",
        "tests/api/test_overload.py::test_who_leaves_takes_the_row_along",
    ),
    Mutation(
        "A Redis killed in the middle of an upload shows nothing of it",
        "prompts_store/redis_store.py",
        """        with _server(), self._redis.pipeline(transaction=True) as pipe:
            if self._stored(task, kept.version) == (True, kept.data):
                return kept.version
            pipe.set(self._bundle_key(task, kept.version), kept.data)
            pipe.hset(self._key(task, "versions"), kept.version, info)
            pipe.sadd(self._names, task)
""",
        """        with _server(), self._redis.pipeline(transaction=False) as pipe:
            if self._stored(task, kept.version) == (True, kept.data):
                return kept.version
            pipe.hset(self._key(task, "versions"), kept.version, info)
            pipe.sadd(self._names, task)
            pipe.set(self._bundle_key(task, kept.version), kept.data)
""",
        "tests/prompts_store/test_redis_killed.py::test_bundles_and_aliases",
    ),
    Mutation(
        "A full disk costs a fit its checkpoint, not the fit",
        "server/worker/checkpoints.py",
        "        except OSError as error:\n",
        "        except ZeroDivisionError as error:\n",
        "tests/e2e/test_full_disk.py::test_checkpoints_caches_and_the_store_of_a_worker",
    ),
    Mutation(
        "At SIGTERM whoever waits is told before the HTTP front gives up",
        "server/processes/http_server.py",
        "        self._server.leave()\n",
        "",
        "tests/e2e/test_drain.py::test_what_the_deadline_does_not_allow_is_told_and_nobody_is_left_without_an_answer",
    ),
    Mutation(
        "A clock that is set back lets no old token in",
        "server/clock.py",
        "return max(self._wall(), self._began + self._steady())",
        "return self._wall()",
        "tests/keys/test_keys.py::test_no_clock_lets_an_old_or_revoked_token_in_again",
    ),
    Mutation(
        "An unload whose client leaves frees the memory as well",
        "server/engine/residency.py",
        "        entry.gone = True  # before anything is awaited: the caller may be cancelled meanwhile\n"
        "        self.revision += 1\n        await asyncio.wait([entry.ready])\n",
        "        self.revision += 1\n        await asyncio.wait([entry.ready])\n        entry.gone = True\n",
        "tests/engine/test_residency.py::test_an_unload_that_its_client_left_frees_the_memory_as_well",
    ),
    Mutation(
        "A task that is asked much does not wait at one engine while another has nothing to do",
        "server/rpc/engine_pool.py",
        "if engine.load <= shortest + self.max_batch]",
        "if engine]",
        "tests/rpc/test_engine_pool.py::test_a_task_that_is_asked_much_spreads",
    ),
    Mutation(
        "An engine that leaves before it has given a seat costs nobody the answer of another",
        "server/rpc/engine_pool.py",
        "if not candidates or not _is_away(error):",
        "if True:",
        "tests/rpc/test_engine_pool.py::test_who_waits_for_a_seat_at_an_engine_that_leaves_gets_one_at_the_other",
    ),
    Mutation(
        "A seat is given back although its rows were never queued",
        "server/serving/predictor.py",
        "        _release_all(rows)\n        raise\n    try:",
        "        raise\n    try:",
        "tests/serving/test_predictor.py::test_seats_are_given_back_where_the_engine_is_away_when_rows_are_ready",
    ),
    Mutation(
        "After the kernel's queue has overflowed, new folders of the store are watched as well",
        "prompts_store/folder_events.py",
        'self._add(self._root, "", 0)  # among',
        "pass  # among",
        "tests/prompts_store/test_folder_events.py::test_nobody_knows_what_was_in_a_queue_that_overflowed",
    ),
    Mutation(
        "What somebody has unloaded does not come back with the task's next change",
        "server/serving/preloader.py",
        "                continue\n",
        "                pass\n",
        "tests/serving/test_preloader.py::test_what_somebody_unloads_stays_away_whatever_else_changes",
    ),
    Mutation(
        "One task's flood does not send its tenant's others away before their body comes",
        "server/api/middleware/admission.py",
        'scope["state"][TASK]',
        '""',
        "tests/api/test_admission.py::test_another_tasks_flood_sends_no_quiet_task_away",
    ),
    Mutation(
        "A loud tenant's quiet tasks leave room for quiet tenants",
        "server/batching/fair_share.py",
        "most + math.ceil(most / 8)",
        "with_reserve(most)",
        "tests/batching/test_batcher.py::test_a_full_queue_of_one_tasks_still_lets_the_tenants_others_in",
    ),
    Mutation(
        "Nobody waits at the door of a server that drains",
        "server/processes/manager.py",
        "        self._listener.close()\n        drain_s",
        "        drain_s",
        "tests/e2e/test_drain.py::test_who_comes_while_others_are_still_being_answered_is_told_to_go_elsewhere",
    ),
    Mutation(
        "A server that drains takes no new rows",
        "server/batching/admission.py",
        "        self._closing = True\n        try:",
        "        try:",
        "tests/e2e/test_drain.py::test_who_comes_while_others_are_still_being_answered_is_told_to_go_elsewhere",
    ),
)
