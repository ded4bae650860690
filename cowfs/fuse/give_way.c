/* Sends replies so that their callers continue on this CPU.
 *
 * The scheduler moves a task that is woken to an idle CPU unless its own CPU is idle, or runs nothing but SCHED_IDLE
 * (select_idle_sibling() in kernel/sched/fair.c). But an idle CPU takes longer to wake than this thread, which has only
 * to wait for the next request, to get out of the way; and then the caller's requests come to another ring. So a
 * thread is SCHED_IDLE while it sends.
 *
 * With other work on this CPU, a thread of SCHED_IDLE waits long for its turn, for seconds if there are several busy
 * processes. Others' requests would wait with it. So another thread watches, and takes it back to SCHED_OTHER. If it
 * took long to come back, the next replies are sent without this.
 */
#define _GNU_SOURCE
#include "give_way.h"

#include <errno.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"

enum {
	LONG = 1000 * 1000, /* ns */
	FOR_A_WHILE = 40,   /* replies */
	QUIET = 25,         /* rounds of the watch in which no thread gave way, before it rests */
};
static const struct timespec ROUND = { 0, 4 * LONG };

static struct {
	bool runs;
	pthread_t thread;
	pthread_mutex_t lock; /* held while it looks at the rings: their threads do not end meanwhile */
	sem_t wake;
	atomic_bool rests, stops;
} watch = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* Take threads back that have waited for long; return whether any has stepped back since the last call. */
static bool look(void)
{
	const struct sched_param none = { 0 };
	bool any = false;

	pthread_mutex_lock(&watch.lock);
	int64_t time = monotonic_ns();
	for (unsigned r = 0; r < ring_count; r++) {
		struct ring *ring = &rings[r];
		int64_t since = atomic_load(&ring->back_since);
		any |= since || atomic_load(&ring->stepped_back) != ring->seen;
		ring->seen = atomic_load(&ring->stepped_back);
		if (since && ring->thread && time - since > LONG)
			sched_setscheduler(ring->thread, SCHED_OTHER, &none);
	}
	pthread_mutex_unlock(&watch.lock);
	return any;
}

static void *keep_watch(void *unused)
{
	unsigned quiet = 0;

	(void)unused;
	while (!atomic_load(&watch.stops)) {
		nanosleep(&ROUND, NULL);
		quiet = look() ? 0 : quiet + 1;
		if (quiet < QUIET)
			continue;
		atomic_store(&watch.rests, true);
		/* A thread that steps back after this look finds that it rests. */
		if (look() || atomic_load(&watch.stops))
			atomic_store(&watch.rests, false);
		else
			while (sem_wait(&watch.wake) && errno == EINTR)
				;
		quiet = 0;
	}
	return NULL;
}

/* Start the watch, unless it runs. Its thread may use the CPUs of the calling one. */
static void start_watch(void)
{
	sigset_t all, before;

	if (watch.runs)
		return;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for other threads */
	sem_init(&watch.wake, 0, 0);
	watch.runs = !pthread_create(&watch.thread, NULL, keep_watch, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void wake_watch(void)
{
	if (atomic_exchange(&watch.rests, false))
		sem_post(&watch.wake);
}

void give_way_stop(void)
{
	if (!watch.runs)
		return;
	atomic_store(&watch.stops, true);
	wake_watch();
	pthread_join(watch.thread, NULL);
	sem_destroy(&watch.wake);
	watch.runs = false;
	atomic_store(&watch.stops, false);
}

void give_way_begin(struct ring *ring)
{
	pthread_mutex_lock(&watch.lock);
	start_watch();
	ring->thread = (pid_t)syscall(SYS_gettid);
	ring->may_give_way = watch.runs;
	pthread_mutex_unlock(&watch.lock);
}

void give_way_end(struct ring *ring)
{
	pthread_mutex_lock(&watch.lock);
	ring->thread = 0;
	ring->may_give_way = false;
	pthread_mutex_unlock(&watch.lock);
}

void give_way(struct ring *ring)
{
	const struct sched_param none = { 0 };

	if (ring->keeps_going) {
		ring->keeps_going--;
		return;
	}
	/* An administrator may have chosen another policy. */
	if (!ring->may_give_way || sched_getscheduler(0) != SCHED_OTHER)
		return;
	int64_t begun = monotonic_ns();
	atomic_fetch_add(&ring->stepped_back, 1);
	atomic_store(&ring->back_since, begun);
	if (atomic_load(&watch.rests))
		wake_watch();
	if (!sched_setscheduler(0, SCHED_IDLE, &none)) {
		io_uring_submit(&ring->uring);
		ring->may_give_way = !sched_setscheduler(0, SCHED_OTHER, &none);
	} else {
		ring->may_give_way = false;
	}
	atomic_store(&ring->back_since, 0);
	if (monotonic_ns() - begun > LONG)
		ring->keeps_going = FOR_A_WHILE;
}
