/* FUSE over io_uring (Linux 6.14; Documentation/filesystems/fuse/fuse-io-uring.rst), beneath libfuse.
 *
 * The kernel has a queue of requests for each CPU, and gives a request to that of the CPU where it is made. A
 * thread of ours for each CPU waits in its ring for the queue's requests, serves them there, and sends the answer
 * with the same system call that waits for the next one. libfuse knows nothing of it: to it, on such a thread, a
 * read(2) gives what /dev/fuse would have given, and a writev(2) takes the answer.
 *
 * FORGET and INTERRUPT still come through /dev/fuse. So does FUSE_INIT, with whose answer it all begins: from
 * then on the kernel holds back every request until each queue has an entry. So whatever could fail is done
 * before that answer is given, and the answer says no if something did.
 *
 * The core lock makes "one thread at a time runs Python that touches the union" true: a ring's thread has it from
 * the arrival of a request to the wait for the next, trio's thread always but when it waits for I/O. Whoever takes
 * it does not have the GIL, and only who has it wants the GIL, so that no two threads fight for that.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "figures.h"
#include "ring.h"

/* include/uapi/linux/fuse.h of Linux 6.14, protocol 7.42: Debian 12 has older headers. */
enum { FUSE_INIT = 26, CMD_REGISTER = 1, CMD_COMMIT_AND_FETCH = 2 };
enum { NOTIFY_RETRIEVE = 5 };
enum { INIT_FLAGS = 3, INIT_MAX_WRITE = 5, INIT_MAX_PAGES = 7, INIT_FLAGS2 = 8 }; /* 32-bit words of the answer */
#define INIT_EXT (1u << 30)
#define OVER_IO_URING (1u << (41 - 32))
#define MIN_PAYLOAD 8192
#define OURS (UINT64_C(1) << 63) /* in the number of a request that we have had made */

struct in_header {
	uint32_t len, opcode;
	uint64_t unique, nodeid;
	uint32_t uid, gid, pid;
	uint16_t extlen, padding;
};

struct out_header {
	uint32_t len;
	int32_t error;
	uint64_t unique;
};

struct ring_header {
	char in_out[128];
	char op_in[128];
	struct {
		uint64_t flags, commit_id;
		uint32_t payload_sz, padding;
		uint64_t reserved;
	} entry;
};

struct command {
	uint64_t flags, commit_id;
	uint16_t qid;
	uint8_t padding[6];
};

enum {
	PAGE = 4096,
	FEW_RINGS = 8,
	ENTRIES = 4,          /* of a queue at first … */
	ENTRIES_OF_MANY = 2,  /* … and where there are more than FEW_RINGS */
	RESERVE = 8,          /* that wait for requests when others have one that waits */
	MOST_ENTRIES = 16384, /* of a queue: nobody shall have all by letting requests wait */
	FILES = 8,
	BUCKETS = 256,
};

static const int64_t PAUSE = 50 * 1000000LL;  /* ns: without a request for so long, the machine may have slept … */
static const int64_t WAKING = 20 * 1000000LL; /* … and for so long it may still be waking */

struct queue { /* of the kernel's: one for each CPU that there could be */
	uint16_t id;
	unsigned entries, idle;
	bool crowded; /* requests may wait in it that got no entry */
};

struct entry { /* room for one request and its answer */
	struct ring_header *header;
	char *payload;
	struct iovec iov[2];
	uint64_t unique;
	uint64_t commit_id;
	struct queue *queue;
	struct ring *ring;
	struct entry *next; /* among those that wait, or those that are answered elsewhere */
};

struct ring { /* one for each of our threads */
	int cpu;
	int event;
	struct io_uring uring;
	bool made; /* that was */
	struct queue *queues;
	unsigned queue_count;
	struct entry *serving; /* what the thread handles now */
	bool locked;           /* the thread has the core lock */
	bool ended;
	uint64_t requests;
	pthread_mutex_t late_lock;
	struct entry *late; /* answered by another thread */
};

static struct ring *rings;
static unsigned ring_count;
static size_t payload_size;
static int device = -1;
static __thread struct ring *mine;

static pthread_mutex_t core;
static atomic_uint core_waiters;
static pthread_mutex_t turnstile = PTHREAD_MUTEX_INITIALIZER; /* trio's thread has it while it waits for the core lock */
static atomic_bool trio_waits;
static struct entry *waiting[BUCKETS]; /* by unique; core lock */

static uint64_t files[FILES]; /* the last that were opened, read or written; core lock */
static unsigned last_file;

static struct {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	enum { UNDECIDED, SERVING, DECLINED } state;
} decision = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, UNDECIDED};
static uint64_t init_unique;
static bool init_offered;
static const char *declined = "the kernel has not asked yet";
static atomic_bool stopping, quitting;

static PyObject *after_pause;
static int64_t last_request, waking_until;

static void take_core(void)
{
	if (atomic_load(&trio_waits)) {
		pthread_mutex_lock(&turnstile);
		pthread_mutex_unlock(&turnstile);
	}
	if (pthread_mutex_trylock(&core) == 0)
		return;
	atomic_fetch_add(&core_waiters, 1);
	pthread_mutex_lock(&core);
	atomic_fetch_sub(&core_waiters, 1);
}

/* For trio's thread, which would never have its turn while all others are busy: it is the next. */
static void take_core_next(void)
{
	pthread_mutex_lock(&turnstile);
	atomic_store(&trio_waits, true);
	atomic_fetch_add(&core_waiters, 1);
	pthread_mutex_lock(&core);
	atomic_fetch_sub(&core_waiters, 1);
	atomic_store(&trio_waits, false);
	pthread_mutex_unlock(&turnstile);
}

static void give_core(struct ring *ring)
{
	if (ring->locked) {
		ring->locked = false;
		pthread_mutex_unlock(&core);
	}
}

static void wake(const struct ring *ring)
{
	uint64_t one = 1;
	ssize_t ignored = write(ring->event, &one, sizeof one);
	(void)ignored;
}

/* --- what is sent to the kernel --- */

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

static bool send_entry(struct entry *e, unsigned operation)
{
	struct io_uring_sqe *sqe = next_sqe(e->ring);
	if (!sqe)
		return false;
	struct command *command = (struct command *)sqe->cmd;
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = device;
	sqe->cmd_op = operation;
	sqe->user_data = (uintptr_t)e;
	if (operation == CMD_REGISTER) {
		sqe->addr = (uintptr_t)e->iov;
		sqe->len = 2;
	}
	command->commit_id = e->commit_id;
	command->qid = e->queue->id;
	e->queue->idle++;
	return true;
}

static void watch_event(struct ring *ring)
{
	struct io_uring_sqe *sqe = next_sqe(ring);
	if (sqe) {
		io_uring_prep_poll_add(sqe, ring->event, POLLIN);
		sqe->user_data = 0;
	}
}

static struct entry *new_entry(struct ring *ring, struct queue *queue)
{
	struct entry *e = calloc(1, sizeof *e);
	/* Pages that no request has used are not there. */
	char *memory = mmap(NULL, PAGE + payload_size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (!e || memory == MAP_FAILED) {
		free(e);
		return NULL;
	}
	e->header = (struct ring_header *)memory;
	e->payload = memory + PAGE;
	e->iov[0] = (struct iovec){e->header, sizeof *e->header};
	e->iov[1] = (struct iovec){e->payload, payload_size};
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
	if (e->ring == mine) {
		mine->serving = NULL;
		send_entry(e, CMD_COMMIT_AND_FETCH); /* goes with the wait for the next request */
		return;
	}
	pthread_mutex_lock(&e->ring->late_lock);
	e->next = e->ring->late;
	e->ring->late = e;
	pthread_mutex_unlock(&e->ring->late_lock);
	wake(e->ring);
}

/* Have the kernel look at who waits in a queue that had no entry left. It gives a new one to nobody who waits
 * already, only to the next who comes, and one that has answered to the next who waits (fuse_uring_do_register()
 * and fuse_uring_commit_fetch() in fs/fuse/dev_uring.c). So we have somebody come: to a FUSE_NOTIFY_RETRIEVE, here
 * of nothing, the kernel says that nothing by a request, in the queue of the CPU where we are. It has to know the
 * inode, which must be a file. Should it know none of these, the next who comes by himself does it. */
static void have_one_come(struct ring *ring, const struct queue *queue)
{
	static uint64_t number;
	struct {
		struct out_header header;
		uint64_t unique, nodeid, offset;
		uint32_t size, padding;
	} retrieve = {{sizeof retrieve, NOTIFY_RETRIEVE, 0}, OURS | ++number << 1, 0, 0, 0, 0};
	cpu_set_t here, there;

	io_uring_submit(&ring->uring); /* the new entry, first */
	CPU_ZERO(&there);
	CPU_SET(queue->id, &there);
	bool elsewhere = queue->id != ring->cpu && !sched_getaffinity(0, sizeof here, &here);
	if (elsewhere && sched_setaffinity(0, sizeof there, &there))
		return; /* we may not go there */
	for (unsigned i = 1; i <= FILES; i++) {
		retrieve.nodeid = files[(last_file + FILES + 1 - i) % FILES];
		if (retrieve.nodeid && write(device, &retrieve, sizeof retrieve) > 0)
			break;
	}
	if (elsewhere)
		sched_setaffinity(0, sizeof here, &here);
}

/* Keep the numbers of some files that the kernel knows. */
static void note_file(const struct in_header *in)
{
	enum { OPEN = 14, WRITE = 16 };

	if (in->opcode >= OPEN && in->opcode <= WRITE && files[last_file] != in->nodeid)
		files[last_file = (last_file + 1) % FILES] = in->nodeid;
}

/* The entry of a request that is being handled: here, or somewhere since it waits. */
static struct entry *take_entry(uint64_t unique)
{
	if (mine && mine->serving && mine->serving->unique == unique)
		return mine->serving;
	for (struct entry **e = &waiting[unique / 2 % BUCKETS]; *e; e = &(*e)->next) {
		if ((*e)->unique == unique) {
			struct entry *found = *e;
			*e = found->next;
			return found;
		}
	}
	return NULL;
}

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
				struct entry *e = new_entry(ring, &ring->queues[q]);
				if (!e)
					return false;
				e->next = ring->late; /* kept there until the thread registers them */
				ring->late = e;
			}
		}
	}
	return true;
}

static ssize_t answer_init(int fd, struct iovec *iov, int count)
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
		payload_size = init[INIT_MAX_WRITE] > pages ? init[INIT_MAX_WRITE] : pages;
		if (payload_size < MIN_PAYLOAD)
			payload_size = MIN_PAYLOAD;
		payload_size = (payload_size + PAGE - 1) / PAGE * PAGE;
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

ssize_t ring_writev(int fd, struct iovec *iov, int count)
{
	const struct out_header *out = iov[0].iov_base;
	struct entry *e;

	if (init_unique && out->unique == init_unique)
		return answer_init(fd, iov, count);
	if (!ring_count || !out->unique || !(e = take_entry(out->unique)))
		return writev(fd, iov, count);
	size_t size = 0;
	for (int i = 1; i < count; i++) {
		if (size + iov[i].iov_len > payload_size) {
			struct out_header failure = {sizeof failure, -EIO, out->unique};
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

static int64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void send_late(struct ring *ring)
{
	uint64_t count;
	ssize_t ignored = read(ring->event, &count, sizeof count);
	(void)ignored;
	pthread_mutex_lock(&ring->late_lock);
	struct entry *e = ring->late;
	ring->late = NULL;
	pthread_mutex_unlock(&ring->late_lock);
	while (e) {
		struct entry *next = e->next; /* e is the kernel's when it is sent */
		send_entry(e, CMD_COMMIT_AND_FETCH);
		e = next;
	}
	watch_event(ring);
}

/* The entry of a request that has come; NULL if none has. */
static struct entry *completed(struct ring *ring)
{
	struct io_uring_cqe *cqe;

	while (!ring->ended && io_uring_peek_cqe(&ring->uring, &cqe) == 0) {
		struct entry *e = (struct entry *)(uintptr_t)cqe->user_data;
		int result = cqe->res;
		io_uring_cqe_seen(&ring->uring, cqe);
		if (!e) {
			send_late(ring);
			ring->ended |= atomic_load(&stopping);
			continue;
		}
		e->queue->idle--;
		if (result == 0)
			return e;
		ring->ended = true; /* ENOTCONN: unmounted; with anything else no request would come any more */
	}
	return NULL;
}

static struct entry *wait_for_request(struct ring *ring)
{
	for (;;) {
		/* Answers go first: their callers wait. */
		if (io_uring_sq_ready(&ring->uring) && io_uring_cq_ready(&ring->uring))
			io_uring_submit(&ring->uring);
		struct entry *e = completed(ring);
		if (e || ring->ended)
			return e;
		int result = io_uring_submit_and_wait(&ring->uring, 1);
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
	if (in->len > size || in->len < sizeof *in + payload || payload > payload_size)
		return -1;
	size_t fixed = in->len - sizeof *in - payload;
	if (fixed > sizeof e->header->op_in)
		return -1;
	memcpy(buffer, in, sizeof *in);
	memcpy(buffer + sizeof *in, e->header->op_in, fixed);
	memcpy(buffer + sizeof *in + fixed, e->payload, payload);
	return in->len;
}

static void tell_of_pause(void)
{
	int64_t time = now();

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
	struct out_header out = {sizeof out, -error, e->unique};
	figures_end(e->unique, error);
	answer(e, &out, 0);
}

static ssize_t next_request(struct ring *ring, char *buffer, size_t size)
{
	for (;;) {
		if (ring->serving) /* nobody has answered */
			refuse(ring->serving, EIO);
		give_core(ring);
		PyThreadState *state = PyEval_SaveThread();
		struct entry *e = wait_for_request(ring);
		if (e) {
			take_core();
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
			struct out_header done = {sizeof done, 0, e->unique};
			answer(e, &done, 0);
			/* Whoever waits is given the entry at once. */
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

bool ring_serves(void)
{
	return mine != NULL;
}

ssize_t ring_read(int fd, void *buffer, size_t size)
{
	if (mine)
		return next_request(mine, buffer, size);
	ssize_t n = read(fd, buffer, size);
	const struct in_header *in = buffer;
	if (n >= (ssize_t)(sizeof *in + 5 * sizeof(uint32_t)) && in->opcode == FUSE_INIT) {
		const uint32_t *init = (const uint32_t *)(in + 1); /* major, minor, max_readahead, flags, flags2 */
		init_unique = in->unique;
		init_offered = (init[3] & INIT_EXT) && (init[4] & OVER_IO_URING);
	}
	return n;
}

void ring_device(int fd)
{
	device = fd;
}

/* --- for Python --- */

static void close_rings(void)
{
	for (unsigned r = 0; r < ring_count; r++) {
		if (rings[r].made)
			io_uring_queue_exit(&rings[r].uring);
		if (rings[r].event >= 0)
			close(rings[r].event);
		free(rings[r].queues);
	}
	/* What the entries have is left to the end of the process: the kernel may still know them. */
	free(rings);
	rings = NULL;
	ring_count = 0;
}

/* io_uring_register(2): Debian 12's liburing 2.3 declares functions for it that it does not have. */
static int tell_ring(struct io_uring *uring, unsigned what, void *argument, unsigned count)
{
	long result = syscall(__NR_io_uring_register, uring->ring_fd, what, argument, count);
	return result < 0 ? -errno : 0;
}

/* Whoever gets the better of the daemon shall not go round its seccomp filter by a ring. */
static int restrict_ring(struct io_uring *uring)
{
	struct io_uring_restriction allowed[] = {
		{.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_URING_CMD},
		{.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_POLL_ADD},
		{.opcode = IORING_RESTRICTION_REGISTER_OP, .register_op = IORING_REGISTER_ENABLE_RINGS},
	};
	return tell_ring(uring, IORING_REGISTER_RESTRICTIONS, allowed, sizeof allowed / sizeof *allowed);
}

static int open_ring(struct ring *ring, unsigned queues)
{
	struct io_uring_params p = {
		.flags = IORING_SETUP_SQE128 | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN |
			 IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_R_DISABLED,
	};
	ring->queues = calloc(queues, sizeof *ring->queues);
	ring->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (!ring->queues || ring->event < 0)
		return -ENOMEM;
	int failure = io_uring_queue_init_params(64, &ring->uring, &p);
	if (failure)
		return failure;
	ring->made = true;
	/* A process that we fork shall not keep it from its end. */
	madvise(ring->uring.sq.ring_ptr, ring->uring.sq.ring_sz, MADV_DONTFORK);
	madvise(ring->uring.cq.ring_ptr, ring->uring.cq.ring_sz, MADV_DONTFORK);
	madvise(ring->uring.sq.sqes, p.sq_entries * 2 * sizeof(struct io_uring_sqe), MADV_DONTFORK);
	pthread_mutex_init(&ring->late_lock, NULL);
	return restrict_ring(&ring->uring);
}

static PyObject *py_open(PyObject *self, PyObject *args)
{
	PyObject *cpus;
	int possible, failure = 0;
	(void)self;
	if (!PyArg_ParseTuple(args, "iO!", &possible, &PyTuple_Type, &cpus))
		return NULL;
	unsigned count = (unsigned)PyTuple_GET_SIZE(cpus);
	pthread_mutexattr_t adaptive;
	pthread_mutexattr_init(&adaptive);
	pthread_mutexattr_settype(&adaptive, PTHREAD_MUTEX_ADAPTIVE_NP);
	pthread_mutex_init(&core, &adaptive);
	rings = calloc(count, sizeof *rings);
	for (; rings && ring_count < count && !failure; ring_count++) {
		rings[ring_count].cpu = (int)PyLong_AsLong(PyTuple_GET_ITEM(cpus, ring_count));
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
		if (ring && ring->queue_count) { /* its own was to be the first */
			ring->queues[ring->queue_count++].id = ring->queues[0].id;
			ring->queues[0].id = (uint16_t)id;
			continue;
		}
		if (!ring)
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
		CPU_ZERO(&set);
		CPU_SET((size_t)ring->cpu, &set);
		sched_setaffinity(0, sizeof set, &set); /* without, it is slower */
		failure = tell_ring(&ring->uring, IORING_REGISTER_ENABLE_RINGS, NULL, 0); /* it is this thread's */
		if (!failure) {
			mine = ring;
			struct entry *e = ring->late;
			ring->late = NULL;
			for (struct entry *next; e; e = next) {
				next = e->next;
				send_entry(e, CMD_REGISTER);
			}
			watch_event(ring);
			int sent = io_uring_submit(&ring->uring);
			failure = sent < 0 ? sent : 0;
		}
	}
	Py_END_ALLOW_THREADS
	if (failure) {
		errno = -failure;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return PyBool_FromLong(serving);
}

static PyObject *py_leave(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	struct entry *e = mine ? mine->serving : NULL;
	if (!e)
		Py_RETURN_NONE;
	mine->serving = NULL;
	e->next = waiting[e->unique / 2 % BUCKETS];
	waiting[e->unique / 2 % BUCKETS] = e;
	madvise(e->payload, payload_size, MADV_DONTNEED); /* what was in it has been taken */
	if (!e->queue->idle)
		e->queue->crowded = true;
	while (e->queue->idle < RESERVE && e->queue->entries < MOST_ENTRIES) {
		struct entry *more = new_entry(mine, e->queue);
		if (!more || !send_entry(more, CMD_REGISTER))
			break;
		e->queue->crowded = true; /* until it is registered the others may all be taken */
	}
	if (e->queue->crowded)
		have_one_come(mine, e->queue);
	Py_RETURN_NONE;
}

static PyObject *py_take(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	Py_BEGIN_ALLOW_THREADS
	take_core();
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

static PyObject *py_give_core(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	if (mine)
		give_core(mine);
	Py_RETURN_NONE;
}

static PyObject *py_finish(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	if (!mine)
		Py_RETURN_NONE;
	if (mine->serving)
		refuse(mine->serving, EIO);
	give_core(mine);
	Py_BEGIN_ALLOW_THREADS
	while (!atomic_load(&quitting)) {
		send_late(mine);
		io_uring_submit(&mine->uring);
		struct pollfd event = {mine->event, POLLIN, 0};
		if (!atomic_load(&quitting))
			poll(&event, 1, -1);
	}
	send_late(mine);
	io_uring_submit(&mine->uring);
	Py_END_ALLOW_THREADS
	mine = NULL;
	Py_RETURN_NONE;
}

static PyObject *tell_all(atomic_bool *what)
{
	atomic_store(what, true);
	decide(false);
	for (unsigned r = 0; r < ring_count; r++)
		wake(&rings[r]);
	Py_RETURN_NONE;
}

static PyObject *py_stop(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return tell_all(&stopping);
}

static PyObject *py_quit(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return tell_all(&quitting);
}

static PyObject *py_close(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	close_rings();
	Py_RETURN_NONE;
}

static PyObject *py_lock(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	if (pthread_mutex_trylock(&core)) {
		Py_BEGIN_ALLOW_THREADS
		take_core_next();
		Py_END_ALLOW_THREADS
	}
	Py_RETURN_NONE;
}

static PyObject *py_unlock(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	pthread_mutex_unlock(&core);
	Py_RETURN_NONE;
}

static PyObject *py_quiet(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return PyBool_FromLong(mine && !io_uring_cq_ready(&mine->uring) && !atomic_load(&core_waiters));
}

static PyObject *py_watch_pauses(PyObject *self, PyObject *callable)
{
	(void)self;
	Py_INCREF(callable);
	Py_XSETREF(after_pause, callable);
	if (callable == Py_None)
		Py_CLEAR(after_pause);
	last_request = now();
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
		PyObject *figures =
			Py_BuildValue("(iKI)", rings[r].cpu, (unsigned long long)rings[r].requests, entries);
		if (!figures || PyList_Append(list, figures))
			Py_CLEAR(list);
		Py_XDECREF(figures);
	}
	return list;
}

PyMethodDef ring_methods[] = {
	{"ring_open", py_open, METH_VARARGS,
	 "ring_open(possible, cpus): make a ring for each of these CPUs, and queues for all that there could be."},
	{"ring_join", py_join, METH_VARARGS,
	 "ring_join(number): be the thread of this ring, once the kernel has taken the offer; False: it has not."},
	{"ring_leave", py_leave, METH_NOARGS, "ring_leave(): another thread goes on with the request of this one."},
	{"ring_finish", py_finish, METH_NOARGS, "ring_finish(): send what others answer, until ring_quit()."},
	{"ring_stop", py_stop, METH_NOARGS, "ring_stop(): take no more requests."},
	{"ring_quit", py_quit, METH_NOARGS, "ring_quit(): everything is answered, the threads may end."},
	{"ring_close", py_close, METH_NOARGS, "ring_close(): after the threads have ended."},
	{"ring_quiet", py_quiet, METH_NOARGS, "ring_quiet(): whether nobody else waits to be served."},
	{"ring_refused", py_refused, METH_NOARGS, "ring_refused(): why requests do not come by rings; '' if they do."},
	{"ring_figures", py_figures, METH_NOARGS, "ring_figures(): CPU, requests and entries of each ring."},
	{"watch_pauses", py_watch_pauses, METH_O, "watch_pauses(call): call it before requests that come after a pause."},
	{"core_lock", py_lock, METH_NOARGS, "core_lock(): let no other thread touch the union."},
	{"core_take", py_take, METH_NOARGS, "core_take(): the same, for one of many threads."},
	{"core_unlock", py_unlock, METH_NOARGS, "core_unlock(): let others."},
	{"core_give", py_give_core, METH_NOARGS, "core_give(): the same for a ring's thread, if it has it."},
	{NULL, NULL, 0, NULL},
};
