/* Begins and ends FUSE over io_uring: makes the rings, accepts io_uring in the reply to FUSE_INIT, closes the rings.
 *
 * After that reply, the kernel holds back all requests until each queue has an entry. So everything that can fail is
 * done before, and the reply accepts io_uring only if all of it succeeded.
 */
#define _GNU_SOURCE
#include "ring_internal.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core_lock.h"
#include "give_way.h"
#include "messages.h"
#include "ring.h"

enum { INIT_FLAGS = 3, INIT_MAX_WRITE = 5, INIT_MAX_PAGES = 7, INIT_FLAGS2 = 8 }; /* 32-bit words of the reply */
#define OVER_IO_URING (1u << (41 - 32))
#define MIN_PAYLOAD 8192

enum {
	FEW_RINGS = 8,
	ENTRIES = 4,         /* of a queue at first */
	ENTRIES_OF_MANY = 2, /* the same with more than FEW_RINGS */
};

struct ring *rings;
unsigned ring_count;
size_t ring_payload;
int ring_fd = -1;
__thread struct ring *ring_mine;
atomic_bool ring_stopping, ring_quitting;

static struct {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	enum { UNDECIDED, SERVING, DECLINED } state;
} decision = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, UNDECIDED };
static uint64_t init_unique;
static bool init_offered;
static const char *declined = "the kernel has not asked yet";

static void decide(bool serving)
{
	pthread_mutex_lock(&decision.lock);
	if (decision.state == UNDECIDED)
		decision.state = serving ? SERVING : DECLINED;
	pthread_cond_broadcast(&decision.changed);
	pthread_mutex_unlock(&decision.lock);
}

static bool make_entries(void)
{
	for (unsigned r = 0; r < ring_count; r++) {
		struct ring *ring = &rings[r];
		for (unsigned q = 0; q < ring->queue_count; q++) {
			unsigned wanted = ring_count > FEW_RINGS || q ? ENTRIES_OF_MANY : ENTRIES;
			while (ring->queues[q].entries < wanted) {
				struct entry *e = ring_new_entry(ring, &ring->queues[q]);
				if (!e)
					return false;
				e->next = ring->late; /* kept there until the thread registers them */
				ring->late = e;
			}
		}
	}
	return true;
}

ssize_t ring_answer_init(int fd, struct iovec *iov, int count)
{
	const struct out_header *out = iov[0].iov_base;
	uint32_t *init = count > 1 ? iov[1].iov_base : NULL;
	bool serving = false;

	init_unique = 0;
	if (!ring_count) {
		declined = "no rings were made";
	} else if (!init_offered) {
		declined = "the kernel does not offer it";
	} else if (out->error || !init || iov[1].iov_len < (INIT_FLAGS2 + 1) * sizeof *init) {
		declined = "libfuse is too old";
	} else {
		size_t pages = (init[INIT_MAX_PAGES] & UINT16_MAX) * (size_t)PAGE;
		ring_payload = init[INIT_MAX_WRITE] > pages ? init[INIT_MAX_WRITE] : pages;
		if (ring_payload < MIN_PAYLOAD)
			ring_payload = MIN_PAYLOAD;
		ring_payload = (ring_payload + PAGE - 1) / PAGE * PAGE;
		serving = make_entries();
		declined = serving ? "" : "there is no memory for it";
	}
	if (serving) {
		init[INIT_FLAGS] |= INIT_EXT;
		init[INIT_FLAGS2] |= OVER_IO_URING;
	}
	ssize_t written = writev(fd, iov, count);
	decide(serving && written > 0);
	return written;
}

void ring_note_init(const void *message, size_t size)
{
	const struct in_header *in = message;

	if (size >= sizeof *in + 5 * sizeof(uint32_t) && in->opcode == FUSE_INIT) {
		const uint32_t *init = (const uint32_t *)(in + 1); /* major, minor, max_readahead, flags, flags2 */
		init_unique = in->unique;
		init_offered = (init[3] & INIT_EXT) && (init[4] & OVER_IO_URING);
	}
}

bool ring_asked_by(uint64_t unique)
{
	return init_unique && unique == init_unique;
}

void ring_device(int fd)
{
	ring_fd = fd;
}

/* --- for Python --- */

static void close_rings(void)
{
	give_way_stop();
	for (unsigned r = 0; r < ring_count; r++) {
		if (rings[r].made)
			io_uring_queue_exit(&rings[r].uring);
		if (rings[r].event >= 0)
			close(rings[r].event);
		free(rings[r].queues);
	}
	/* The memory of the entries is not freed: the kernel may still use it. */
	free(rings);
	rings = NULL;
	ring_count = 0;
}

/* io_uring_register(2): liburing 2.3 of Debian 12 declares functions for it but does not contain them. */
static int tell_ring(struct io_uring *uring, unsigned what, void *argument, unsigned count)
{
	long result = syscall(__NR_io_uring_register, uring->ring_fd, what, argument, count);
	return result < 0 ? -errno : 0;
}

/* An attacker who takes over the daemon must not bypass its seccomp filter through a ring. */
static int restrict_ring(struct io_uring *uring)
{
	struct io_uring_restriction allowed[] = {
		{ .opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_URING_CMD },
		{ .opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_POLL_ADD },
		{ .opcode = IORING_RESTRICTION_REGISTER_OP, .register_op = IORING_REGISTER_ENABLE_RINGS },
	};
	return tell_ring(uring, IORING_REGISTER_RESTRICTIONS, allowed, sizeof allowed / sizeof *allowed);
}

static int open_ring(struct ring *ring, unsigned queues)
{
	struct io_uring_params p = {
		/* With the last flag, the kernel stores requests only while this thread waits for them, at most 20 at a time
		 * (IO_LOCAL_TW_DEFAULT_MAX in io_uring/io_uring.c). Otherwise a burst would take memory for all its
		 * data at once. IORING_SETUP_TASKRUN_FLAG would make liburing do that with each reply, too. */
		.flags = IORING_SETUP_SQE128 | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_R_DISABLED |
			 IORING_SETUP_DEFER_TASKRUN,
	};
	ring->queues = calloc(queues, sizeof *ring->queues);
	ring->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (!ring->queues || ring->event < 0)
		return -ENOMEM;
	int failure = io_uring_queue_init_params(64, &ring->uring, &p);
	if (failure)
		return failure;
	ring->made = true;
	/* A forked process must not keep the ring open. */
	madvise(ring->uring.sq.ring_ptr, ring->uring.sq.ring_sz, MADV_DONTFORK);
	madvise(ring->uring.cq.ring_ptr, ring->uring.cq.ring_sz, MADV_DONTFORK);
	madvise(ring->uring.sq.sqes, p.sq_entries * 2 * sizeof(struct io_uring_sqe), MADV_DONTFORK);
	pthread_mutex_init(&ring->late_lock, NULL);
	return restrict_ring(&ring->uring);
}

static int gives_way; /* threads may leave SCHED_OTHER, see give_way.c */

static PyObject *py_open(PyObject *self, PyObject *args)
{
	PyObject *cpus;
	int possible, failure = 0;
	(void)self;
	if (!PyArg_ParseTuple(args, "iO!p", &possible, &PyTuple_Type, &cpus, &gives_way))
		return NULL;
	unsigned count = (unsigned)PyTuple_GET_SIZE(cpus);
	core_lock_init();
	rings = calloc(count, sizeof *rings);
	for (; rings && ring_count < count && !failure; ring_count++) {
		rings[ring_count].cpu = (int)PyLong_AsLong(PyTuple_GET_ITEM(cpus, ring_count));
		TAILQ_INIT(&rings[ring_count].large);
		failure = open_ring(&rings[ring_count], (unsigned)possible);
	}
	if (failure || !ring_count || PyErr_Occurred()) {
		close_rings();
		if (PyErr_Occurred())
			return NULL;
		errno = failure ? -failure : ENOMEM;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	/* Each CPU's own queue first, then those of the CPUs that have no thread, in turn. */
	unsigned turn = 0;
	for (int id = 0; id < possible; id++) {
		struct ring *ring = NULL;
		for (unsigned r = 0; r < ring_count; r++)
			if (rings[r].cpu == id)
				ring = &rings[r];
		if (ring && ring->queue_count) { /* the thread's own queue must be its first */
			ring->queues[ring->queue_count++].id = ring->queues[0].id;
			ring->queues[0].id = (uint16_t)id;
			continue;
		}
		if (!ring)
			/* There is at least one ring. NOLINTNEXTLINE(clang-analyzer-core.DivideZero) */
			ring = &rings[turn++ % ring_count];
		ring->queues[ring->queue_count++].id = (uint16_t)id;
	}
	Py_RETURN_NONE;
}

static PyObject *py_join(PyObject *self, PyObject *args)
{
	unsigned number;
	int failure = 0;
	bool serving;
	(void)self;
	if (!PyArg_ParseTuple(args, "I", &number))
		return NULL;
	struct ring *ring = &rings[number];
	Py_BEGIN_ALLOW_THREADS
	pthread_mutex_lock(&decision.lock);
	while (decision.state == UNDECIDED)
		pthread_cond_wait(&decision.changed, &decision.lock);
	serving = decision.state == SERVING;
	pthread_mutex_unlock(&decision.lock);
	if (serving) {
		cpu_set_t set;
		if (gives_way)
			give_way_begin(ring);
		CPU_ZERO(&set);
		CPU_SET((size_t)ring->cpu, &set);
		sched_setaffinity(0, sizeof set, &set); /* if it fails, it is only slower */
		failure = tell_ring(&ring->uring, IORING_REGISTER_ENABLE_RINGS, NULL, 0); /* binds it to this thread */
		if (!failure) {
			ring_mine = ring;
			struct entry *e = ring->late;
			ring->late = NULL;
			for (struct entry *next; e; e = next) {
				next = e->next;
				ring_send_entry(e, CMD_REGISTER);
			}
			ring_watch_event(ring);
			int sent = io_uring_submit(&ring->uring);
			failure = sent < 0 ? sent : 0;
		}
	}
	Py_END_ALLOW_THREADS
	if (failure) {
		give_way_end(ring);
		errno = -failure;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return PyBool_FromLong(serving);
}

static PyObject *tell_all(atomic_bool *what)
{
	atomic_store(what, true);
	decide(false);
	for (unsigned r = 0; r < ring_count; r++)
		ring_wake(&rings[r]);
	Py_RETURN_NONE;
}

static PyObject *py_stop(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return tell_all(&ring_stopping);
}

static PyObject *py_quit(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return tell_all(&ring_quitting);
}

static PyObject *py_close(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	close_rings();
	Py_RETURN_NONE;
}

static PyObject *py_refused(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return PyUnicode_FromString(decision.state == SERVING ? "" : declined);
}

static PyObject *py_figures(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	PyObject *list = PyList_New(0);
	for (unsigned r = 0; list && r < ring_count; r++) {
		unsigned entries = 0;
		for (unsigned q = 0; q < rings[r].queue_count; q++)
			entries += rings[r].queues[q].entries;
		PyObject *figures = Py_BuildValue("(iKI)", rings[r].cpu, (unsigned long long)rings[r].requests,
						  entries);
		if (!figures || PyList_Append(list, figures))
			Py_CLEAR(list);
		Py_XDECREF(figures);
	}
	return list;
}

PyMethodDef ring_setup_methods[] = {
	{ "ring_open", py_open, METH_VARARGS,
	  "ring_open(possible, cpus, gives_way): make a ring for each of these CPUs, and queues for all possible CPUs.\n"
	  "gives_way: threads may be SCHED_IDLE for a moment, and can come back." },
	{ "ring_join", py_join, METH_VARARGS,
	  "ring_join(number): let this thread serve a ring; False if the kernel has not accepted the offer. Blocks." },
	{ "ring_stop", py_stop, METH_NOARGS, "ring_stop(): accept no more requests." },
	{ "ring_quit", py_quit, METH_NOARGS, "ring_quit(): let the threads end; everything is answered." },
	{ "ring_close", py_close, METH_NOARGS, "ring_close(): free the rings, after the threads have ended." },
	{ "ring_refused", py_refused, METH_NOARGS,
	  "ring_refused(): why requests do not come through rings; '' if they do." },
	{ "ring_figures", py_figures, METH_NOARGS, "ring_figures(): CPU, requests and entries of each ring." },
	{ NULL, NULL, 0, NULL },
};
