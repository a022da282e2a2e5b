/*
 * The thread pool: runs the tasks of a program in order, each task's chunks on any thread.
 *
 * One word, `claim` = epoch:24 | task:16 | left:24, holds all that threads compete for. A thread takes a chunk
 * by lowering `left` by compare-and-swap; whoever finishes the last chunk of a task publishes the next task. A
 * task is over when its chunks are done, not when all threads have arrived, so a thread that the operating
 * system has put aside costs nothing unless it holds a chunk. Threads look at the task list only after a
 * successful swap, so the caller may rewrite the list between runs.
 *
 * Between runs threads spin for a while and then sleep. They are created on first use, never destroyed, and
 * created again in a forked child.
 */
#define _GNU_SOURCE
#include "orcd.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MAX_THREADS 256
#define MAX_TASKS 0xffff /* this task number in `claim` means: the program is over */
#define MAX_CHUNKS 0xffffff
#define PAUSES_BEFORE_YIELD 500
#define SPIN_NANOSECONDS 1500000 /* longer than the gap between two steps, shorter than anyone would notice */

#define EPOCH(c) ((c) >> 40)
#define TASK(c) (((c) >> 24) & 0xffff)
#define LEFT(c) ((c) & 0xffffff)
#define CLAIM(epoch, task, left) ((uint64_t)(epoch) << 40 | (uint64_t)(task) << 24 | (uint64_t)(left))

typedef struct {
  _Alignas(64) void *data;
  size_t bytes;
} buffer;

static struct {
  _Alignas(64) _Atomic uint64_t claim;
  _Alignas(64) _Atomic int64_t done;       /* chunks of the current task that are finished */
  _Alignas(64) _Atomic uint32_t generation; /* counts runs; what sleeping threads wait on */
  _Atomic int32_t sleeping;
  _Atomic int32_t active; /* threads that take part, the caller included */
  /* Written by the caller between runs only. */
  _Alignas(64) pthread_mutex_t running;
  uint64_t epoch;
  orcd_task *tasks;
  int64_t num_tasks, capacity;
  int threads_created;
  int pin;
  buffer thread_scratch[MAX_THREADS];
  buffer shared_scratch[2];
  int next_shared;
  void *retired[64]; /* outgrown shared scratch that earlier operations of this run still point to */
  int num_retired;
} pool = {.claim = CLAIM(0, MAX_TASKS, 0), .active = 1, .running = PTHREAD_MUTEX_INITIALIZER};

static _Thread_local int caller_pinned;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- sleeping ------------------------------------------------------------------------------------------ */

#ifdef __linux__
static void wait_while(uint32_t seen) {
  syscall(SYS_futex, (uint32_t *)&pool.generation, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void wake_all(void) {
  syscall(SYS_futex, (uint32_t *)&pool.generation, FUTEX_WAKE_PRIVATE, MAX_THREADS, NULL, NULL, 0);
}

static void reset_sleep(void) {}
#else
static pthread_mutex_t sleep_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sleep_condition = PTHREAD_COND_INITIALIZER;

static void wait_while(uint32_t seen) {
  pthread_mutex_lock(&sleep_mutex);
  while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&sleep_condition, &sleep_mutex);
  pthread_mutex_unlock(&sleep_mutex);
}

static void wake_all(void) {
  pthread_mutex_lock(&sleep_mutex);
  pthread_cond_broadcast(&sleep_condition);
  pthread_mutex_unlock(&sleep_mutex);
}

static void reset_sleep(void) {
  pthread_mutex_init(&sleep_mutex, NULL);
  pthread_cond_init(&sleep_condition, NULL);
}
#endif

static void pin_to_nth_cpu(int n) {
#ifdef __linux__
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  int count = CPU_COUNT(&allowed), wanted = count > 0 ? n % count : 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &allowed) && wanted-- == 0) {
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      sched_setaffinity(0, sizeof one, &one);
      return;
    }
#else
  (void)n;
#endif
}

/* ---- working ------------------------------------------------------------------------------------------- */

/* Run the chunk just claimed; the thread that finishes the last one publishes the next task. */
static void run_chunk(uint64_t claimed, int thread) {
  const int64_t index = (int64_t)TASK(claimed);
  const orcd_task *task = &pool.tasks[index];
  const int64_t num_chunks = task->num_chunks;
  task->run(task, num_chunks - (int64_t)LEFT(claimed), thread);
  if (atomic_fetch_add_explicit(&pool.done, 1, memory_order_acq_rel) + 1 != num_chunks) return;
  atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
  uint64_t next = CLAIM(EPOCH(claimed), MAX_TASKS, 0);
  if (index + 1 < pool.num_tasks) next = CLAIM(EPOCH(claimed), index + 1, pool.tasks[index + 1].num_chunks);
  atomic_store_explicit(&pool.claim, next, memory_order_release);
}

/* Take chunks until the program of `epoch` is over. */
static void work(uint64_t epoch, int thread) {
  int pauses = 0;
  for (;;) {
    uint64_t c = atomic_load_explicit(&pool.claim, memory_order_acquire);
    if (EPOCH(c) != epoch || TASK(c) == MAX_TASKS) return;
    if (LEFT(c) == 0) {
      if (++pauses < PAUSES_BEFORE_YIELD)
        relax();
      else
        sched_yield(); /* the thread we wait for may need this core */
      continue;
    }
    if (!atomic_compare_exchange_weak_explicit(&pool.claim, &c, c - 1, memory_order_acq_rel, memory_order_relaxed))
      continue;
    pauses = 0;
    run_chunk(c, thread);
  }
}

static uint32_t next_generation(uint32_t seen) {
  const int64_t start = now();
  uint32_t generation;
  for (int pauses = 0;; pauses++) {
    generation = atomic_load_explicit(&pool.generation, memory_order_acquire);
    if (generation != seen) return generation;
    if (pauses < PAUSES_BEFORE_YIELD) {
      relax();
      continue;
    }
    if (now() - start < SPIN_NANOSECONDS) {
      sched_yield();
      continue;
    }
    atomic_fetch_add(&pool.sleeping, 1);
    if (atomic_load(&pool.generation) == seen) wait_while(seen);
    atomic_fetch_sub(&pool.sleeping, 1);
  }
}

typedef struct {
  int thread, cpu;
  uint32_t seen;
} start;

static void *worker(void *argument) {
  const start s = *(start *)argument;
  free(argument);
  if (s.cpu >= 0) pin_to_nth_cpu(s.cpu);
  uint32_t seen = s.seen;
  for (;;) {
    seen = next_generation(seen);
    if (s.thread >= atomic_load_explicit(&pool.active, memory_order_relaxed)) continue;
    work(EPOCH(atomic_load_explicit(&pool.claim, memory_order_acquire)), s.thread);
  }
  return NULL;
}

/* ---- threads ------------------------------------------------------------------------------------------- */

static void forget_threads(void) { /* in a forked child: only the forking thread exists */
  pool.threads_created = 0;
  atomic_store(&pool.sleeping, 0);
  atomic_store(&pool.done, 0);
  atomic_store(&pool.claim, CLAIM(pool.epoch, MAX_TASKS, 0));
  pthread_mutex_init(&pool.running, NULL);
  reset_sleep();
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_threads); }

/* Threads that cannot be had are done without: the caller alone finishes any program. */
static void create_threads(int wanted) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, watch_forks);
  sigset_t all, before; /* signals are the main thread's business */
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, 1 << 20);
  while (pool.threads_created + 1 < wanted) {
    start *s = malloc(sizeof *s);
    if (s == NULL) break;
    s->thread = pool.threads_created + 1;
    s->cpu = pool.pin ? s->thread : -1;
    s->seen = atomic_load(&pool.generation);
    pthread_t id;
    if (pthread_create(&id, &attributes, worker, s) != 0) {
      free(s);
      break;
    }
    pool.threads_created++;
  }
  pthread_attr_destroy(&attributes);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}

int orcd_set_threads(int num_threads, int pin) {
  if (num_threads < 1 || num_threads > MAX_THREADS) return -EINVAL;
  pthread_mutex_lock(&pool.running);
  atomic_store(&pool.active, num_threads);
  pool.pin = pin;
  pthread_mutex_unlock(&pool.running);
  return 0;
}

int orcd_num_threads(void) { return atomic_load(&pool.active); }

/* ---- scratch ------------------------------------------------------------------------------------------- */

static void *allocate(size_t bytes) {
  void *data = NULL;
  return posix_memalign(&data, 64, bytes) == 0 ? data : NULL;
}

void *orcd_thread_scratch(int thread, size_t bytes) {
  if (thread < 0 || thread >= MAX_THREADS) return NULL;
  buffer *b = &pool.thread_scratch[thread];
  if (bytes <= b->bytes) return b->data;
  bytes = (bytes + bytes / 4 + 4095) & ~(size_t)4095;
  void *data = allocate(bytes), *outgrown = b->data;
  if (data == NULL) return NULL;
  b->data = data; /* at every moment what a fork would copy is usable */
  b->bytes = bytes;
  free(outgrown);
  return data;
}

void *orcd_shared_scratch(size_t bytes) {
  buffer *b = &pool.shared_scratch[pool.next_shared];
  pool.next_shared ^= 1;
  if (bytes <= b->bytes) return b->data;
  if (b->data != NULL && pool.num_retired == (int)(sizeof pool.retired / sizeof *pool.retired)) return NULL;
  if (bytes < 2 * b->bytes) bytes = 2 * b->bytes; /* so that 64 retired buffers are never reached */
  bytes = (bytes + 4095) & ~(size_t)4095;
  void *data = allocate(bytes);
  if (data == NULL) return NULL;
  if (b->data != NULL) pool.retired[pool.num_retired++] = b->data;
  b->data = data;
  b->bytes = bytes;
  return data;
}

static void free_retired(void) {
  while (pool.num_retired > 0) free(pool.retired[--pool.num_retired]);
}

/* ---- running ------------------------------------------------------------------------------------------- */

static int plan(const orcd_op *op, const orcd_batch *batch, orcd_task *tasks) {
  switch (op->kind) {
    case ORCD_LINEAR: return orcd_plan_linear(op, batch, tasks);
    case ORCD_EMBED:
    case ORCD_EMBED_POSITIONS: return orcd_plan_embed(op, batch, tasks);
    case ORCD_STORE_KV: return orcd_plan_store_kv(op, batch, tasks);
    case ORCD_ATTENTION: return orcd_plan_attention(op, batch, tasks);
    case ORCD_ROUTE: return orcd_plan_route(op, batch, tasks);
    case ORCD_EXPERT_LINEAR: return orcd_plan_expert_linear(op, batch, tasks);
    case ORCD_RMS_NORM:
    case ORCD_ROPE:
    case ORCD_SWIGLU:
    case ORCD_ADD:
    case ORCD_SCALE:
    case ORCD_TAKE:
    case ORCD_ROPE_ANGLES:
    case ORCD_LAYER_NORM:
    case ORCD_GELU:
    case ORCD_GEGLU:
    case ORCD_CLAMPED_SWIGLU:
    case ORCD_COMBINE: return orcd_plan_elementwise(op, batch, tasks);
    default: return -EINVAL;
  }
}

static int plan_all(const orcd_op *ops, int32_t num_ops, const orcd_batch *batch) {
  if (num_ops < 0 || num_ops > MAX_TASKS / 2) return -EINVAL;
  if (2 * (int64_t)num_ops > pool.capacity) {
    orcd_task *tasks = realloc(pool.tasks, 2 * (size_t)num_ops * sizeof *tasks);
    if (tasks == NULL) return -ENOMEM;
    pool.tasks = tasks;
    pool.capacity = 2 * (int64_t)num_ops;
  }
  pool.num_tasks = 0;
  for (int32_t i = 0; i < num_ops; i++) {
    orcd_task *planned = &pool.tasks[pool.num_tasks];
    const int count = plan(&ops[i], batch, planned);
    if (count < 0) return count;
    for (int j = 0; j < count; j++) {
      if (planned[j].num_chunks > MAX_CHUNKS) return -E2BIG;
      if (planned[j].num_chunks > 0) pool.tasks[pool.num_tasks++] = planned[j];
    }
  }
  return 0;
}

static void run_alone(void) {
  for (int64_t i = 0; i < pool.num_tasks; i++) {
    const orcd_task *task = &pool.tasks[i];
    for (int64_t chunk = 0; chunk < task->num_chunks; chunk++) task->run(task, chunk, 0);
  }
}

static void run_together(int threads) {
  if (pool.threads_created + 1 < threads) create_threads(threads);
  if (pool.pin && !caller_pinned) {
    pin_to_nth_cpu(0);
    caller_pinned = 1;
  }
  pool.epoch = (pool.epoch + 1) & 0xffffff;
  atomic_store_explicit(&pool.claim, CLAIM(pool.epoch, 0, pool.tasks[0].num_chunks), memory_order_release);
  atomic_fetch_add(&pool.generation, 1);
  if (atomic_load(&pool.sleeping) > 0) wake_all();
  work(pool.epoch, 0);
}

int orcd_run(const orcd_op *ops, int32_t num_ops, const orcd_batch *batch) {
  pthread_mutex_lock(&pool.running);
  free_retired();
  const int result = plan_all(ops, num_ops, batch);
  if (result == 0 && pool.num_tasks > 0) {
    const int threads = atomic_load_explicit(&pool.active, memory_order_relaxed);
    if (threads == 1)
      run_alone();
    else
      run_together(threads);
  }
  pthread_mutex_unlock(&pool.running);
  return result;
}
