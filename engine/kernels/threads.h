/* Threads for the kernels: parallel_for(), and the workers behind it.
 *
 * Not OpenMP, for the sake of machines that have something else to do: its threads all have to arrive at the end of every
 * loop, so that one that is not on a core holds up the rest, and until then they spin on cores that others wait for. Here
 * a loop ends when its chunks are done, no matter by which thread: if no worker comes in time the caller does them all. A
 * thread that waits offers its core to others, and after a while sleeps.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#define MAX_THREADS 256
#define SPINS_BEFORE_YIELD 64   /* about a microsecond: as long as the gap between two loops of a layer */
#define YIELDS_BEFORE_SLEEP 4000 /* some milliseconds: longer than the gap between two steps */

/* Computes items [begin, end); `thread` is below the number of threads and differs between those that run at a time. */
typedef void (*range_function)(const void *arguments, int64_t begin, int64_t end, int thread);

static struct {
  /* (loop number << 32) | chunks not yet taken. A chunk is taken by counting down in one step with a look at the loop's
   * number, so a late worker cannot take a later loop's chunk for its own. A thread that has taken one may read the
   * fields below, as the loop cannot end before that chunk is done. */
  _Atomic uint64_t ticket;
  _Atomic int64_t done;
  range_function function;
  const void *arguments;
  int64_t items, chunks;

  atomic_flag busy;
  int threads;         /* wanted */
  int workers;         /* started */
  _Atomic int sleepers;
  pthread_mutex_t mutex;
  pthread_cond_t wake;
} pool = {.busy = ATOMIC_FLAG_INIT, .threads = 1, .mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void relax(int *spins) {
  if (++*spins % SPINS_BEFORE_YIELD == 0) sched_yield();
#if defined(__x86_64__)
  else __builtin_ia32_pause();
#elif defined(__aarch64__)
  else __asm__ volatile("yield");
#endif
}

/* Take and do one chunk; 0 if there is none left. */
static int do_chunk(int thread) {
  uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
  do {
    if ((uint32_t)ticket == 0) return 0;
  } while (!atomic_compare_exchange_weak_explicit(&pool.ticket, &ticket, ticket - 1, memory_order_acq_rel,
                                                  memory_order_acquire));
  const int64_t chunk = pool.chunks - (int64_t)(uint32_t)ticket;
  pool.function(pool.arguments, pool.items * chunk / pool.chunks, pool.items * (chunk + 1) / pool.chunks, thread);
  atomic_fetch_add_explicit(&pool.done, 1, memory_order_release);
  return 1;
}

static void *work(void *number) {
  const int thread = (int)(intptr_t)number;
  for (int spins = 0;;) {
    if (thread < pool.threads && do_chunk(thread)) {
      spins = 0;
      continue;
    }
    relax(&spins);
    if (spins < SPINS_BEFORE_YIELD * YIELDS_BEFORE_SLEEP) continue;
    pthread_mutex_lock(&pool.mutex);
    atomic_fetch_add(&pool.sleepers, 1);
    /* parallel_for publishes its chunks before it looks for sleepers: either it sees this one or this one sees them */
    while ((uint32_t)atomic_load(&pool.ticket) == 0 || thread >= pool.threads) pthread_cond_wait(&pool.wake, &pool.mutex);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.mutex);
    spins = 0;
  }
  return 0;
}

/* Use `threads` threads from now on, the caller's among them; returns how many there are. */
static int set_threads(int threads) {
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  if (threads < 1) threads = 1;
  pthread_mutex_lock(&pool.mutex);
  while (pool.workers < threads - 1) {
    pthread_t worker;
    if (pthread_create(&worker, 0, work, (void *)(intptr_t)(pool.workers + 1))) break;
    pthread_detach(worker);
    pool.workers++;
  }
  pool.threads = threads < pool.workers + 1 ? threads : pool.workers + 1;
  pthread_mutex_unlock(&pool.mutex);
  return pool.threads;
}

/* Do items [0, items), shared among the threads if there are `work` operations or so to do. */
static void parallel_for(int64_t items, int64_t work, range_function function, const void *arguments) {
  if (items <= 0) return;
  /* Less work than this takes no longer than handing it over. A second caller at the same time does its own alone. */
  if (pool.threads == 1 || items == 1 || work < 32768 || atomic_flag_test_and_set_explicit(&pool.busy, memory_order_acquire)) {
    function(arguments, 0, items, 0);
    return;
  }
  int64_t chunks = pool.threads * 8; /* so many that a thread that comes late leaves little to wait for */
  if (chunks > items) chunks = items;
  pool.function = function;
  pool.arguments = arguments;
  pool.items = items;
  pool.chunks = chunks;
  atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
  const uint64_t loop = (atomic_load_explicit(&pool.ticket, memory_order_relaxed) >> 32) + 1;
  atomic_store(&pool.ticket, loop << 32 | (uint64_t)chunks);
  if (atomic_load(&pool.sleepers)) {
    pthread_mutex_lock(&pool.mutex);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);
  }
  while (do_chunk(0)) {
  }
  for (int spins = 0; atomic_load_explicit(&pool.done, memory_order_acquire) < chunks;) relax(&spins);
  atomic_flag_clear_explicit(&pool.busy, memory_order_release);
}
