/*
 * Pages of mapped files that cannot be read: the file was shortened since, or the disk fails.
 *
 * The system then sends SIGBUS to whoever reads them, which ends a process. Here such a page, and all behind it
 * in its range, become zeros, and the range is marked, so that the reader goes on and then asks whether what it
 * has read is worth anything. What lies in no watched range is left to whoever took SIGBUS before.
 */
#define _GNU_SOURCE
#include "orcd.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_RANGES 1024

static struct {
  _Atomic uintptr_t start; /* 0: free. Written last, so that the handler never sees half a range */
  _Atomic uintptr_t end;
  _Atomic int lost;
} ranges[MAX_RANGES];
static pthread_mutex_t changing = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction before;
static uintptr_t page_bytes; /* 0: the handler is not there yet */

static int make_zeros(uintptr_t address) {
  for (int i = 0; i < MAX_RANGES; i++) {
    uintptr_t start = atomic_load(&ranges[i].start), end = atomic_load(&ranges[i].end);
    if (start == 0 || address < start || address >= end) continue;
    void *page = (void *)(address & ~(page_bytes - 1));
    int flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (mmap(page, end - (uintptr_t)page, PROT_READ, flags, -1, 0) == MAP_FAILED) return 0;
    atomic_store(&ranges[i].lost, 1);
    return 1;
  }
  return 0;
}

static void on_bus_error(int number, siginfo_t *info, void *context) {
  int kept = errno;
  int done = info->si_code > 0 && make_zeros((uintptr_t)info->si_addr); /* <= 0: somebody has sent it */
  errno = kept;
  if (done) return;
  if (before.sa_flags & SA_SIGINFO) {
    before.sa_sigaction(number, info, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(number);
  } else { /* it comes again as soon as this returns, and ends the process */
    signal(number, SIG_DFL);
    if (info->si_code <= 0) raise(number);
  }
}

static int take_signal(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE); /* before the handler can need it */
  if (sigaction(SIGBUS, &action, &before) == 0) return 0;
  page_bytes = 0;
  return -errno;
}

int orcd_watch_pages(const void *start, int64_t bytes) {
  int found = -ENOSPC;
  if (start == NULL || bytes <= 0) return -EINVAL;
  pthread_mutex_lock(&changing);
  int error = page_bytes ? 0 : take_signal();
  for (int i = 0; i < MAX_RANGES && error == 0 && found < 0; i++) {
    if (atomic_load(&ranges[i].start) != 0) continue;
    atomic_store(&ranges[i].lost, 0);
    atomic_store(&ranges[i].end, (uintptr_t)start + (uintptr_t)bytes);
    atomic_store(&ranges[i].start, (uintptr_t)start);
    found = i;
  }
  pthread_mutex_unlock(&changing);
  return error ? error : found;
}

int orcd_pages_lost(int range) {
  return range >= 0 && range < MAX_RANGES && atomic_load(&ranges[range].lost);
}

void orcd_forget_pages(int range) {
  if (range >= 0 && range < MAX_RANGES) atomic_store(&ranges[range].start, 0);
}
