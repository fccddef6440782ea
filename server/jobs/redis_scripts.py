"""The Lua scripts of the job store. Redis runs each script alone, and each changes everything or nothing.

A change is computed in Python from a job with its stamp. It is refused (0) where the stamp has changed since. The new
stamp is random and chosen by the writer, so that a change whose answer was lost can be sent again and counts once.

Out of memory, Redis refuses the first command that needs some; in each script that command precedes all other writes.
"""

from __future__ import annotations

from typing import Final

# KEYS: job, events, waiting, leases, finished, state before, state after
# ARGV: stamp read, new stamp, id, job, its score in each of waiting, leases and finished or '', idempotency key, event…
_WRITE: Final = """
redis.call('HSET', KEYS[1], 'job', ARGV[4], 'stamp', ARGV[2])
for i = 9, #ARGV do redis.call('RPUSH', KEYS[2], ARGV[i]) end
for i = 3, 5 do
  if ARGV[i + 2] == '' then
    redis.call('ZREM', KEYS[i], ARGV[3])
  else
    redis.call('ZADD', KEYS[i], ARGV[i + 2], ARGV[3])
  end
end
redis.call('ZREM', KEYS[6], ARGV[3])
redis.call('ZADD', KEYS[7], 0, ARGV[3])
"""

# The answer is the number of the last event, or 0.
CHANGE: Final = f"""
local stamp = redis.call('HGET', KEYS[1], 'stamp')
if stamp == ARGV[2] then return redis.call('LLEN', KEYS[2]) end
if stamp ~= ARGV[1] then return 0 end
{_WRITE}
return redis.call('LLEN', KEYS[2])
"""

# As above and KEYS: newest, all, task and, with an idempotency key, keys. The stamp read is the newest id.
SUBMIT: Final = f"""
if redis.call('HGET', KEYS[1], 'stamp') == ARGV[2] then return 1 end
if (redis.call('GET', KEYS[8]) or '') ~= ARGV[1] then return 0 end
{_WRITE}
redis.call('SET', KEYS[8], ARGV[3])
for i = 9, 10 do redis.call('ZADD', KEYS[i], 0, ARGV[3]) end
if KEYS[11] then redis.call('HSET', KEYS[11], ARGV[8], ARGV[3]) end
return 1
"""

# KEYS: waiting, leases. ARGV: now, the key of a job less its id. The jobs that may be next, each with its stamp: those
# whose lease expired, and the head of the queue.
NEXT: Final = """
local ids, found = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[1]), {}
local head = redis.call('ZRANGE', KEYS[1], 0, 0)
if head[1] then table.insert(ids, head[1]) end
for i, id in ipairs(ids) do found[i] = redis.call('HMGET', ARGV[2] .. id, 'job', 'stamp') end
return found
"""

# KEYS: an index. ARGV: upper bound, how many, the key of a job less its id. Jobs, newest first.
PAGE: Final = """
local ids = redis.call('ZREVRANGEBYLEX', KEYS[1], ARGV[1], '-', 'LIMIT', 0, ARGV[2])
for i, id in ipairs(ids) do ids[i] = redis.call('HGET', ARGV[3] .. id, 'job') end
return ids
"""

# KEYS: job, events, keys, index… ARGV: id, idempotency key. 1 if this call deleted the job.
FORGET: Final = """
if redis.call('DEL', KEYS[1]) == 0 then return 0 end
redis.call('DEL', KEYS[2])
if redis.call('HGET', KEYS[3], ARGV[2]) == ARGV[1] then redis.call('HDEL', KEYS[3], ARGV[2]) end
for i = 4, #KEYS do redis.call('ZREM', KEYS[i], ARGV[1]) end
return 1
"""
