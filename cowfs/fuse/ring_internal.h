/* What ring.c and ring_setup.c share: the rings, their queues and entries. */
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
	bool kernels;       /* it waits for a request */
	bool large;         /* its memory is in use, or was and is kept */
	TAILQ_ENTRY(entry) among_large;
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
	TAILQ_HEAD(, entry) large; /* the last one used is the last */
	unsigned large_count;
	pthread_mutex_t late_lock;
	struct entry *late;     /* answered by another thread */
	struct entry *answered; /* they were late, and are being sent */
};

extern struct ring *rings;
extern unsigned ring_count;
extern size_t ring_payload; /* bytes: the longest answer, and the longest data of a request */
extern int ring_fd;         /* /dev/fuse */
extern __thread struct ring *ring_mine;
extern atomic_bool ring_stopping, ring_quitting;

/* Have a ring's thread look at what others have answered, and whether it is to stop. */
void ring_wake(const struct ring *ring);

struct entry *ring_new_entry(struct ring *ring, struct queue *queue);
bool ring_send_entry(struct entry *e, unsigned operation);
void ring_watch_event(struct ring *ring);

/* An entry has, or had, so many bytes of data. For the ring's thread, as those that follow. */
void ring_memory_used(struct entry *e, size_t size);

/* Give back the memory of an entry that is not the kernel's. */
void ring_memory_drop(struct entry *e);

/* Give back the memory of those that the kernel has, but for a few; right after the kernel was entered. */
void ring_memory_trim(struct ring *ring);

/* Look whether a message of the kernel is FUSE_INIT, and whether it offers io_uring. */
void ring_note_init(const void *message, size_t size);

/* Whether a request was that FUSE_INIT; its answer goes by ring_answer_init(). */
bool ring_asked_by(uint64_t unique);
ssize_t ring_answer_init(int fd, struct iovec *iov, int count);

#endif
