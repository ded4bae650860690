/* FUSE over io_uring (Linux 6.14; Documentation/filesystems/fuse/fuse-io-uring.rst), below libfuse.
 *
 * The kernel has a queue of requests for each CPU, and puts a request into the queue of the CPU where it is made. For
 * each CPU, a thread of the daemon waits in a ring for requests, serves them, and sends each reply with the system call
 * that waits for the next request. libfuse does not notice: on such a thread, its read(2) gets the message that
 * /dev/fuse would give, and its writev(2) passes the reply.
 *
 * FORGET and INTERRUPT still come through /dev/fuse, and so does FUSE_INIT, the first request: see ring_setup.c.
 */
#define _GNU_SOURCE
#include "ring_internal.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "clock.h"
#include "core_lock.h"
#include "give_way.h"
#include "messages.h"
#include "request_stats.h"
#include "ring.h"

enum { NOTIFY_RETRIEVE = 5 };
#define OURS (UINT64_C(1) << 63) /* in the number of a request that the daemon caused itself */

enum {
	RESERVE = 8,          /* entries that wait for requests while others are in use */
	MOST_ENTRIES = 16384, /* of a queue: waiting requests must not take all memory */
	LATE_AT_ONCE = 16,    /* replies of other threads that are sent at once */
	FILES = 8,
	BUCKETS = 256,
};

static const int64_t PAUSE = 50 * 1000000LL;  /* ns without a request after which the machine may have slept */
static const int64_t WAKING = 20 * 1000000LL; /* ns during which the machine may still be waking up */

static struct entry *waiting[BUCKETS]; /* by unique; core lock */

static uint64_t files[FILES]; /* the files opened, read or written last; core lock */
static unsigned last_file;

static PyObject *after_pause;
static int64_t last_request, waking_until;

static void give_core(struct ring *ring)
{
	if (ring->locked) {
		ring->locked = false;
		core_lock_give();
	}
}

void ring_wake(const struct ring *ring)
{
	uint64_t one = 1;
	ssize_t ignored = write(ring->event, &one, sizeof one);
	(void)ignored;
}

/* --- sending to the kernel --- */

static struct io_uring_sqe *next_sqe(struct ring *ring)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);

	if (!sqe) {
		io_uring_submit(&ring->uring);
		sqe = io_uring_get_sqe(&ring->uring);
	}
	if (sqe)
		memset(sqe, 0, 2 * sizeof *sqe); /* IORING_SETUP_SQE128 */
	return sqe;
}

bool ring_send_entry(struct entry *e, unsigned operation)
{
	struct io_uring_sqe *sqe = next_sqe(e->ring);
	if (!sqe)
		return false;
	struct command *command = (struct command *)sqe->cmd;
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = ring_fd;
	sqe->cmd_op = operation;
	sqe->user_data = (uintptr_t)e;
	if (operation == CMD_REGISTER) {
		sqe->addr = (uintptr_t)e->iov;
		sqe->len = 2;
	}
	command->commit_id = e->commit_id;
	command->qid = e->queue->id;
	if (operation == CMD_COMMIT_AND_FETCH)
		ring_memory_used(e, e->header->entry.payload_sz);
	e->kernels = true;
	e->queue->idle++;
	return true;
}

void ring_watch_event(struct ring *ring)
{
	struct io_uring_sqe *sqe = next_sqe(ring);
	if (sqe) {
		io_uring_prep_poll_add(sqe, ring->event, POLLIN);
		sqe->user_data = 0;
	}
}

struct entry *ring_new_entry(struct ring *ring, struct queue *queue)
{
	struct entry *e = calloc(1, sizeof *e);
	/* Pages that no request has used take no memory. */
	char *memory = mmap(NULL, PAGE + ring_payload, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (!e || memory == MAP_FAILED) {
		free(e);
		return NULL;
	}
	e->header = (struct ring_header *)memory;
	e->payload = memory + PAGE;
	e->iov[0] = (struct iovec){ e->header, sizeof *e->header };
	e->iov[1] = (struct iovec){ e->payload, ring_payload };
	e->ring = ring;
	e->queue = queue;
	queue->entries++;
	return e;
}

/* --- answers --- */

static void answer(struct entry *e, const struct out_header *out, size_t size)
{
	memcpy(e->header->in_out, out, sizeof *out);
	e->header->entry.flags = 0;
	e->header->entry.payload_sz = (uint32_t)size;
	e->unique = 0;
	if (e->ring == ring_mine) {
		ring_mine->serving = NULL;
		ring_send_entry(e, CMD_COMMIT_AND_FETCH); /* sent with the wait for the next request */
		return;
	}
	pthread_mutex_lock(&e->ring->late_lock);
	e->next = e->ring->late;
	e->ring->late = e;
	pthread_mutex_unlock(&e->ring->late_lock);
	ring_wake(e->ring);
}

/* Make the kernel serve the requests that wait in a queue without free entries. The kernel gives a new entry only to
 * the next new request, not to a waiting one; it gives an entry that has been answered to the next waiting request
 * (fuse_uring_do_register() and fuse_uring_commit_fetch() in fs/fuse/dev_uring.c). So cause a new request: the kernel
 * answers FUSE_NOTIFY_RETRIEVE, here for 0 bytes, with a request in the queue of the present CPU. It must know the
 * inode, which must be a file. If it knows none of these files, the next new request has the same effect. */
static void cause_request(struct ring *ring, const struct queue *queue)
{
	static uint64_t number;
	struct {
		struct out_header header;
		uint64_t unique, nodeid, offset;
		uint32_t size, padding;
	} retrieve = { { sizeof retrieve, NOTIFY_RETRIEVE, 0 }, OURS | ++number << 1, 0, 0, 0, 0 };
	cpu_set_t here, there;

	io_uring_submit(&ring->uring); /* submits the new entry first */
	CPU_ZERO(&there);
	CPU_SET(queue->id, &there);
	bool elsewhere = queue->id != ring->cpu && !sched_getaffinity(0, sizeof here, &here);
	if (elsewhere && sched_setaffinity(0, sizeof there, &there))
		return; /* this CPU is not allowed */
	for (unsigned i = 1; i <= FILES; i++) {
		retrieve.nodeid = files[(last_file + FILES + 1 - i) % FILES];
		if (retrieve.nodeid && write(ring_fd, &retrieve, sizeof retrieve) > 0)
			break;
	}
	if (elsewhere)
		sched_setaffinity(0, sizeof here, &here);
}

/* Remember the numbers of some files that the kernel knows. */
static void note_file(const struct in_header *in)
{
	if (in->opcode >= FUSE_OPEN && in->opcode <= FUSE_WRITE && files[last_file] != in->nodeid)
		files[last_file = (last_file + 1) % FILES] = in->nodeid;
}

/* The entry of a request that is being handled: by this thread, or in the table of waiting requests. */
static struct entry *take_entry(uint64_t unique)
{
	if (ring_mine && ring_mine->serving && ring_mine->serving->unique == unique)
		return ring_mine->serving;
	for (struct entry **e = &waiting[unique / 2 % BUCKETS]; *e; e = &(*e)->next) {
		if ((*e)->unique == unique) {
			struct entry *found = *e;
			*e = found->next;
			return found;
		}
	}
	return NULL;
}

ssize_t ring_writev(int fd, struct iovec *iov, int count)
{
	const struct out_header *out = iov[0].iov_base;
	struct entry *e;

	if (ring_asked_by(out->unique))
		return ring_answer_init(fd, iov, count);
	if (!ring_count || !out->unique || !(e = take_entry(out->unique)))
		return writev(fd, iov, count);
	size_t size = 0;
	for (int i = 1; i < count; i++) {
		if (size + iov[i].iov_len > ring_payload) {
			struct out_header failure = { sizeof failure, -EIO, out->unique };
			answer(e, &failure, 0);
			return (ssize_t)out->len;
		}
		memcpy(e->payload + size, iov[i].iov_base, iov[i].iov_len);
		size += iov[i].iov_len;
	}
	answer(e, out, size);
	return (ssize_t)(sizeof *out + size);
}

/* --- requests --- */

/* Send a few late replies. With each, the kernel may store the next request and its data, which is then served. */
static void send_late(struct ring *ring)
{
	uint64_t count;
	ssize_t ignored = read(ring->event, &count, sizeof count);
	(void)ignored;
	pthread_mutex_lock(&ring->late_lock);
	if (!ring->answered) {
		ring->answered = ring->late;
		ring->late = NULL;
	}
	bool more = ring->late;
	pthread_mutex_unlock(&ring->late_lock);
	for (unsigned i = 0; ring->answered && i < LATE_AT_ONCE; i++) {
		struct entry *e = ring->answered;
		ring->answered = e->next; /* after sending, e belongs to the kernel */
		ring_send_entry(e, CMD_COMMIT_AND_FETCH);
	}
	if (more || ring->answered)
		ring_wake(ring);
	ring_watch_event(ring);
}

/* The entry of a request that has been received; NULL if none has. */
static struct entry *completed(struct ring *ring)
{
	struct io_uring_cqe *cqe;

	while (!ring->ended && io_uring_cq_ready(&ring->uring) && io_uring_peek_cqe(&ring->uring, &cqe) == 0) {
		struct entry *e = (struct entry *)(uintptr_t)cqe->user_data;
		int result = cqe->res;
		io_uring_cqe_seen(&ring->uring, cqe);
		if (!e) {
			send_late(ring);
			ring->ended |= atomic_load(&ring_stopping);
			continue;
		}
		e->kernels = false;
		e->queue->idle--;
		if (result == 0)
			return e;
		ring->ended = true; /* ENOTCONN: unmounted; after other errors no request would come either */
	}
	return NULL;
}

static struct entry *wait_for_request(struct ring *ring)
{
	for (;;) {
		/* Send replies first: their callers wait. */
		if (io_uring_sq_ready(&ring->uring) && io_uring_cq_ready(&ring->uring)) {
			io_uring_submit(&ring->uring);
			ring_memory_trim(ring);
		}
		struct entry *e = completed(ring);
		if (e || ring->ended)
			return e;
		if (io_uring_sq_ready(&ring->uring))
			give_way(ring);
		int result = io_uring_submit_and_wait(&ring->uring, 1);
		ring_memory_trim(ring);
		if (result < 0 && result != -EINTR && result != -EAGAIN && result != -EBUSY)
			ring->ended = true;
	}
}

/* The message that /dev/fuse would have given. */
static ssize_t put_together(struct entry *e, char *buffer, size_t size)
{
	const struct in_header *in = (const struct in_header *)e->header->in_out;
	size_t payload = e->header->entry.payload_sz;

	e->unique = in->unique;
	e->commit_id = e->header->entry.commit_id;
	if (in->len > size || in->len < sizeof *in + payload || payload > ring_payload)
		return -1;
	size_t fixed = in->len - sizeof *in - payload;
	if (fixed > sizeof e->header->op_in)
		return -1;
	memcpy(buffer, in, sizeof *in);
	memcpy(buffer + sizeof *in, e->header->op_in, fixed);
	memcpy(buffer + sizeof *in + fixed, e->payload, payload);
	ring_memory_used(e, payload);
	return in->len;
}

static void tell_of_pause(void)
{
	int64_t time = monotonic_ns();

	if (after_pause) {
		if (time - last_request > PAUSE)
			waking_until = time + WAKING;
		if (time < waking_until) {
			PyObject *result = PyObject_CallNoArgs(after_pause);
			if (!result)
				PyErr_WriteUnraisable(after_pause);
			Py_XDECREF(result);
		}
	}
	last_request = time;
}

static void refuse(struct entry *e, int error)
{
	struct out_header out = { sizeof out, -error, e->unique };
	request_stats_end(e->unique, error);
	answer(e, &out, 0);
}

static ssize_t next_request(struct ring *ring, char *buffer, size_t size)
{
	for (;;) {
		if (ring->serving) /* the request was not answered */
			refuse(ring->serving, EIO);
		give_core(ring);
		PyThreadState *state = PyEval_SaveThread();
		struct entry *e = wait_for_request(ring);
		if (e) {
			core_lock_take();
			ring->locked = true;
		}
		PyEval_RestoreThread(state);
		if (!e) {
			errno = ENODEV; /* libfuse ends its session */
			return -1;
		}
		ring->serving = e;
		ssize_t length = put_together(e, buffer, size);
		if (length > 0 && e->unique & OURS) {
			struct out_header done = { sizeof done, 0, e->unique };
			answer(e, &done, 0);
			/* A waiting request gets the entry at once. */
			io_uring_submit(&ring->uring);
			if (!io_uring_cq_ready(&ring->uring))
				e->queue->crowded = false;
			continue;
		}
		if (length > 0) {
			ring->requests++;
			note_file((const struct in_header *)buffer);
			tell_of_pause();
			return length;
		}
	}
}

ssize_t ring_read(int fd, void *buffer, size_t size)
{
	if (ring_mine)
		return next_request(ring_mine, buffer, size);
	ssize_t n = read(fd, buffer, size);
	if (n > 0)
		ring_note_init(buffer, (size_t)n);
	return n;
}

bool ring_serves(void)
{
	return ring_mine != NULL;
}

static PyObject *py_leave(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	struct entry *e = ring_mine ? ring_mine->serving : NULL;
	if (!e)
		Py_RETURN_NONE;
	ring_mine->serving = NULL;
	e->next = waiting[e->unique / 2 % BUCKETS];
	waiting[e->unique / 2 % BUCKETS] = e;
	ring_memory_drop(e); /* its content has been read */
	if (!e->queue->idle)
		e->queue->crowded = true;
	while (e->queue->idle < RESERVE && e->queue->entries < MOST_ENTRIES) {
		struct entry *more = ring_new_entry(ring_mine, e->queue);
		if (!more || !ring_send_entry(more, CMD_REGISTER))
			break;
		e->queue->crowded = true; /* before it is registered, all others may be in use */
	}
	/* An entry that cannot be sent is kept; MOST_ENTRIES limits them. NOLINTNEXTLINE(clang-analyzer-unix.Malloc) */
	if (e->queue->crowded)
		cause_request(ring_mine, e->queue);
	Py_RETURN_NONE;
}

static PyObject *py_give_core(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	if (ring_mine)
		give_core(ring_mine);
	Py_RETURN_NONE;
}

/* Wait in the ring, not in poll(2): at unmount, the kernel waits until the completions are taken. */
static void send_until_quit(struct ring *ring)
{
	struct io_uring_cqe *cqe;
	int result = 0;

	while (!atomic_load(&ring_quitting)) {
		if (result < 0 && result != -EINTR && result != -EAGAIN && result != -EBUSY) {
			struct pollfd event = { ring->event, POLLIN, 0 };
			poll(&event, 1, -1);
			send_late(ring);
		}
		result = io_uring_submit_and_wait(&ring->uring, 1);
		while (io_uring_cq_ready(&ring->uring) && io_uring_peek_cqe(&ring->uring, &cqe) == 0) {
			bool is_event = !cqe->user_data; /* requests are not answered any more */
			io_uring_cqe_seen(&ring->uring, cqe);
			if (is_event)
				send_late(ring);
		}
	}
	while (ring->late || ring->answered) /* other threads do not answer any more */
		send_late(ring);
	io_uring_submit(&ring->uring);
}

static PyObject *py_finish(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	if (!ring_mine)
		Py_RETURN_NONE;
	if (ring_mine->serving)
		refuse(ring_mine->serving, EIO);
	give_core(ring_mine);
	Py_BEGIN_ALLOW_THREADS
	send_until_quit(ring_mine);
	give_way_end(ring_mine);
	Py_END_ALLOW_THREADS
	ring_mine = NULL;
	Py_RETURN_NONE;
}

bool ring_is_quiet(void)
{
	if (ring_mine && !io_uring_cq_ready(&ring_mine->uring))
		io_uring_get_events(&ring_mine->uring);
	return ring_mine && !io_uring_cq_ready(&ring_mine->uring) && !core_lock_wanted();
}

PyThreadState *ring_step_out(void)
{
	give_core(ring_mine);
	return PyEval_SaveThread();
}

void ring_step_in(PyThreadState *state)
{
	core_lock_take();
	ring_mine->locked = true;
	PyEval_RestoreThread(state);
}

static PyObject *py_quiet(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return PyBool_FromLong(ring_is_quiet());
}

static PyObject *py_watch_pauses(PyObject *self, PyObject *callable)
{
	(void)self;
	Py_INCREF(callable);
	Py_XSETREF(after_pause, callable);
	if (callable == Py_None)
		Py_CLEAR(after_pause);
	last_request = monotonic_ns();
	Py_RETURN_NONE;
}

PyMethodDef ring_methods[] = {
	{ "ring_leave", py_leave, METH_NOARGS, "ring_leave(): another thread continues with the request of this one." },
	{ "ring_finish", py_finish, METH_NOARGS,
	  "ring_finish(): send the replies of other threads, until ring_quit()." },
	{ "ring_quiet", py_quiet, METH_NOARGS, "ring_quiet(): whether no other request waits." },
	{ "watch_pauses", py_watch_pauses, METH_O,
	  "watch_pauses(call): set a function to call before a request that comes after a pause." },
	{ "core_give", py_give_core, METH_NOARGS,
	  "core_give(): release the core lock if this thread serves a ring and holds it." },
	{ NULL, NULL, 0, NULL },
};
