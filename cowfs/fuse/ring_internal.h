/* Shared by ring.c, ring_memory.c and ring_setup.c: the rings, their queues and entries. */
#ifndef COWFS_RING_INTERNAL_H
#define COWFS_RING_INTERNAL_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <liburing.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/types.h>
#include <sys/uio.h>

/* include/uapi/linux/fuse.h of Linux 6.14, protocol 7.42: Debian 12 has older headers. */
enum { CMD_REGISTER = 1, CMD_COMMIT_AND_FETCH = 2 };
enum { PAGE = 4096 };

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

struct queue { /* a queue of the kernel: one for each possible CPU */
	uint16_t id;
	unsigned entries, idle;
	bool crowded; /* requests that got no entry may wait in it */
};

struct entry { /* memory for one request and its reply */
	struct ring_header *header;
	char *payload;
	struct iovec iov[2];
	uint64_t unique;
	uint64_t commit_id;
	struct queue *queue;
	struct ring *ring;
	struct entry *next; /* in the list of waiting entries, or of those answered by other threads */
	bool kernels;       /* the kernel has it: it waits for a request */
	bool large;         /* its memory is in use, or is kept after use */
	TAILQ_ENTRY(entry) among_large;
};

struct ring { /* one for each serving thread */
	int cpu;
	int event;
	struct io_uring uring;
	bool made; /* the ring exists */
	struct queue *queues;
	unsigned queue_count;
	struct entry *serving; /* the request that the thread handles */
	bool locked;           /* the thread holds the core lock */
	bool ended;
	bool may_give_way;              /* the thread may be SCHED_IDLE while it sends replies: see give_way.c */
	unsigned keeps_going;           /* so many replies are sent without that */
	pid_t thread;                   /* its ID; 0: none serves */
	_Atomic int64_t back_since;     /* ns: it is SCHED_IDLE since then; 0: it is not */
	atomic_uint stepped_back, seen; /* how often it was; the same when the watch last looked */
	uint64_t requests;
	TAILQ_HEAD(, entry) large; /* in order of use, the latest last */
	unsigned large_count;
	pthread_mutex_t late_lock;
	struct entry *late;     /* answered by other threads */
	struct entry *answered; /* late entries that are being sent */
};

extern struct ring *rings;
extern unsigned ring_count;
extern size_t ring_payload; /* bytes: the longest reply, and the longest data of a request */
extern int ring_fd;         /* /dev/fuse */
extern __thread struct ring *ring_mine;
extern atomic_bool ring_stopping, ring_quitting;

/* Wake a ring's thread, so that it sends the replies of other threads, or stops. */
void ring_wake(const struct ring *ring);

struct entry *ring_new_entry(struct ring *ring, struct queue *queue);
bool ring_send_entry(struct entry *e, unsigned operation);
void ring_watch_event(struct ring *ring);

/* Record that an entry uses *size* bytes of data. Only for the ring's thread, as the next functions. */
void ring_memory_used(struct entry *e, size_t size);

/* Free the memory of an entry that the kernel does not have. */
void ring_memory_drop(struct entry *e);

/* Free the memory of entries that the kernel has, except a few. Call it directly after io_uring_enter(2). */
void ring_memory_trim(struct ring *ring);

/* Examine a message of the kernel: whether it is FUSE_INIT and offers io_uring. */
void ring_note_init(const void *message, size_t size);

/* Whether a request was that FUSE_INIT, whose reply ring_answer_init() completes. */
bool ring_asked_by(uint64_t unique);
ssize_t ring_answer_init(int fd, struct iovec *iov, int count);

#endif
