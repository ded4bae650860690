/*
 * Declarations shared by the parts of the engine.
 *
 *   io.c         the image's file, with traces and injected faults
 *   cache.c      the cache of metadata blocks, and their undo
 *   operation.c  operations: lock, retry, failure
 *   nowait.c     threads that must not wait for the disk
 *   journal.c    the journal's blocks, superblock, begin and end
 *   commit.c     commit and checkpoint
 *   replay.c     recovery of the journal after a crash
 *   redo.c       the log of uncommitted changes, which survives the process; redo_read.c: its recovery
 *   alloc.c      blocks and inodes: bitmaps, counts, freed blocks that are held back
 *   inode.c      inodes, their attributes, the orphan list, deletion
 *   lazy_free.c  freeing inodes without names in steps
 *   data.c       block pointers; reading and writing
 *   free_data.c  truncating, and punching holes
 *   dir.c        names in directories; htree.c: indexed directories
 *   xattr.c      extended attributes
 *   host_space.c space on the disk that contains the image
 *   give_back.c  returning freed blocks of a sparse image to that disk
 *   unsynced.c   file data that is not on disk yet, and may be refused there
 *   track.c      which parts of the image were written
 *   super.c      the superblock: features and geometry
 *   open.c       opening, closing, suspending
 *   engine.c, names.c, sync.c  the other entry points
 *
 * All metadata is changed in the cache, only through block_change(). It saves the old bytes for an undo, and adds the
 * block to the running transaction. A cached block never moves while an operation runs, so pointers into it stay
 * valid until the end of the operation.
 *
 * Errors are not returned: fail() jumps to the end of the operation, which is undone there. So if a function returns,
 * it has succeeded. Only code that runs outside of operations (I/O, commit, checkpoint) returns -errno.
 */
#pragma once
#include <pthread.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>
#include <ext2fs/ext2_fs.h>
#include <ext2fs/ext2_ext_attr.h>

#include "engine.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "ext3 is little-endian, and the engine does not convert it"
#endif

#define NS 1000000000LL
#define QUICK_SYNC (NS / 1000 * 3 / 2)
#define BLOCK_MAX 65536u
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))

/* A cached metadata block. */
struct block {
	uint32_t nr;
	uint32_t flags;
	struct block *next; /* with the same hash */
	char *logged;       /* LOGGED: the content in the log, if *data* is newer */
	char data[];
};
#define DIRTY 1        /* belongs to the running transaction */
#define LISTED 2       /* is in img->dirty (perhaps no longer DIRTY) */
#define LOGGING 4      /* belongs to the transaction that is being committed */
#define LOGGED 8       /* committed, but not home yet */
#define PINNED 16      /* never evicted */
#define USED 32        /* since the clock's hand passed */
#define HAS_ROOM 128   /* is allocated on the disk */
#define WAS_ESCAPED 64 /* LOGGING: it begins with the journal's magic number */

/* Runs of blocks. */
struct run {
	uint32_t start, count;
};
struct runs {
	struct run *run;
	size_t n, cap;
};

/* A change made by the running operation; see block_change(). */
struct change {
	struct block *block;
	uint32_t offset, length; /* length 0: the block was fresh: undo makes it free */
	size_t old;              /* the position of its old bytes in undo.bytes */
};
struct mark {
	size_t changes, bytes, held;
};

/* GOES_ON: continues a change that has begun. */
enum change_kind { CHANGES_NOTHING, CHANGES, GOES_ON };

/* An entry for a block. In img->patches: the newest content of a block that is not home. */
struct patch {
	uint32_t nr;
	uint32_t source; /* the block of the image with the content; 0: only *data* has it */
	bool used, escaped;
	bool home; /* already written home, while others are not */
	char *data;
};
struct table { /* open addressing; the size is a power of two */
	struct patch *slot;
	uint32_t mask, n;
};

/* Checksums of file data: see unsynced.c. */
struct sums {
	struct table table;
	bool broken; /* some are missing, for lack of memory */
};
#define LOST_MAX 64
struct edge { /* a unit that was written in part, and its content since */
	uint64_t unit;
	bool known;
	char data[4096];
};

/* One operation, on the stack of the entry point. */
struct op {
	x3_image *img;
	enum change_kind changing;
	bool starved; /* found no free block, while some are held back */
	uint32_t ino; /* the operation must wait while this inode is being truncated */
	int tries, error;
	size_t held_before; /* img->held.n at the start */
	uint64_t rest;      /* blocks left in an inode that was freed in part */
	struct {
		/* Bytes of file data to zero after the redo record is written: data_clear_late() */
		uint64_t off;
		uint32_t len, ino;
	} late;
	int64_t result;
	jmp_buf escape;
};

/* A file that is being truncated in several steps. On the stack of x3_truncate(). */
struct truncation {
	uint32_t ino;
	struct truncation *next;
};

/* An inode without a name that is freed in steps. */
struct doomed {
	uint32_t ino;
	uint64_t blocks; /* left */
};

struct x3_image {
	/* the file */
	int fd, trace_fd;
	int meminfo; /* /proc/meminfo, which a confined daemon cannot open; -1: unknown */
	uint32_t debug;
	bool read_only;
	pthread_mutex_t io_lock; /* protects the fields below, up to the blank line */
	uint64_t barriers, bytes_written;
	int64_t sync_ns;           /* how long x3_fsync() takes if it uses the disk: a moving average; atomic */
	pthread_mutex_t sync_lock; /* held during a barrier; protects the barriers' numbers */
	uint64_t barrier_nr;
	uint64_t writes;       /* number of writes; atomic */
	uint64_t bytes_synced; /* how much of bytes_written the last successful barrier covers; atomic */
	uint64_t synced;       /* number of writes that the last successful barrier covers; UINT64_MAX: unknown */
	int inject_kind, inject_error, inject_sticky;
	int64_t inject_nth;
	bool inject_holds;
	pthread_cond_t inject_wake;

	pthread_mutex_t sums_lock; /* protects the fields below, up to the blank line */
	struct sums sums, syncing; /* syncing: covered by the running barrier, or by the last one, which failed */
	uint64_t failures;         /* number of failed barriers; atomic */
	int failure;               /* -errno of the last one */
	bool unjudged;             /* it has not been handled yet */

	pthread_mutex_t lock; /* protects everything below */
	pthread_cond_t wake;  /* a commit has ended, a reader has left, a truncation is complete */
	struct op *op;        /* the running operation */
	int aborted;
	char message[256];

	/* geometry */
	uint32_t bs, bits; /* block size, and its binary logarithm */
	uint32_t inode_size, extra_isize, inodes_per_group, blocks_per_group, first_block;
	uint32_t groups, gd_blocks, blocks, inodes, first_ino;
	uint64_t size_max, overhead;
	bool filetype, dir_index;
	uint64_t cache_bytes;
	struct block *sb_block, **gd_block;
	struct ext2_super_block *sb;
	uint64_t random;        /* for i_generation */
	struct x3_facts opened; /* the facts at open */

	/* cache */
	struct block **bucket, **all; /* all: for eviction */
	uint32_t bucket_mask;
	size_t cached, cached_cap, cached_max, hand;
	uint64_t hits, misses; /* of block_get() */
	struct {
		struct change *change;
		size_t n, cap;
		char *bytes;
		size_t used, size;
	} undo;

	/* the running transaction */
	uint32_t tid;
	struct block **dirty;
	size_t ndirty, dirty_cap, dirty_max;
	struct runs held;          /* blocks freed in it */
	uint64_t held_now;         /* their number */
	volatile uint32_t pressed; /* threads in a hurry must not make changes before a commit */
	uint32_t changed[4096];    /* by a hash of the inode: tid of its last change */
	uint32_t lasting[4096];    /* the same for changes except of its times */

	/* the journal */
	uint32_t *jmap, jlen, jfirst, jhead;
	uint32_t *jsorted, jblocks; /* the blocks of its inode, sorted: jmap itself, if that is sorted */
	uint32_t jend;              /* the end of the log, before the end of the journal */
	char jsb[1024];
	bool committing;     /* one thread commits or checkpoints */
	uint32_t atoms;      /* calls of x3_begin without x3_end: no transaction ends */
	bool suspended;      /* all threads wait, except the one that resumes it */
	bool resuming, dead; /* dead: resuming failed */
	pthread_t resumer;
	uint32_t committed;
	struct block **logging; /* the transaction being committed */
	size_t nlogging, logging_cap;
	char *log; /* its image as it is written to the journal */
	size_t log_size;
	struct runs held_logging;
	struct block **logged; /* all blocks that are not home yet */
	size_t nlogged, logged_cap;
	struct runs held_logged; /* freed and committed, but still in the log */
	uint64_t commits, checkpoints;

	/* recovery: see replay.c */
	struct table patches;
	uint32_t mounted_at; /* s_mtime */
	bool has_errors;     /* s_state records errors */
	uint32_t replayed;   /* transactions found in the journal */
	bool stale;          /* another driver has ignored the journal: it is out of date */
	uint64_t redone;     /* records found in the redo log */

	/* the redo log */
	struct {
		bool on;
		uint64_t session;
		uint32_t blocks;          /* in the ring */
		uint32_t tid;             /* the transaction whose records are written */
		uint32_t count, previous; /* numbers of its records, and of those of the transaction before */
		/* Positions in the ring, never wrapped: of the next record, of the first one of *tid*, and of the first
		   one that is needed. */
		uint64_t head, first, needed;
		char *buf; /* the next record */
		size_t used, cap;
		uint32_t nr; /* the block of its last piece */
		bool broken; /* it is incomplete, for lack of memory */
		bool lost;   /* see redo.c */
		uint32_t lost_tid;
		struct found { /* the records of one transaction that recovery has found */
			char *data;
			size_t length, cap;
		} found[2];
		struct table seen; /* the blocks in one of them, while it is checked */
	} redo;
	uint32_t due; /* the transaction that should be committed soon */
	bool woken;   /* x3_wait() must return */

	/* allocation */
	char **hold; /* per group: a bitmap of its free blocks that must not be used yet, or NULL */
	uint64_t nheld;

	/* space on the disk */
	bool in_memory, no_fallocate; /* in_memory: there is always space */
	bool gives_back;              /* returns freed blocks to its disk */
	int stalled;                  /* errno; logged or dirty blocks wait for space */
	bool excused;                 /* the stall began between x3_begin and x3_end */
	int64_t tried_ns, saved_ns;
	bool unsure;                    /* it is unknown whether the disk accepts the data in the page cache */
	bool tells_early;               /* write may report an error that fdatasync then does not */
	bool data_lost;                 /* the disk refused data, and it is no longer in memory */
	uint32_t lost[LOST_MAX], nlost; /* the inodes that lost it */
	struct edge edge[2];
	int edge_turn;    /* the edge that was used last */
	uint64_t patched; /* number of writes to blocks in img->patches */

	/* see track.c */
	struct {
		bool on, beyond; /* beyond: a part without a bit was written */
		uint64_t *map;
	} track;

	/* data */
	uint32_t readers; /* threads that read file data without the lock */
	bool draining;    /* wait for them */
	struct truncation *truncations;

	/* Inodes on the orphan list that are freed in steps: see doom() */
	struct doomed *doomed;
	size_t ndoomed, doomed_cap;
	uint64_t doomed_blocks; /* left in all of them */
	bool attended;          /* a thread calls x3_wait() again and again */

	struct {
		uint32_t ino, previous;
	} orphan_hint[4096]; /* previous: probably the inode before *ino* in the orphan list */
};

/* An inode, in its block. */
struct inode {
	uint32_t ino;
	struct block *block;
	uint32_t offset;
	struct ext2_inode_large *raw;
};

/* --- track.c --- */

void track_write(x3_image *img, uint64_t off, uint64_t end);
void track_free(x3_image *img);

/* --- io.c --- */

int io_read(x3_image *img, void *buf, size_t len, uint64_t off);
int io_read_raw(x3_image *img, void *buf, size_t len, uint64_t off);
int io_write(x3_image *img, const struct iovec *iov, int count, uint64_t off);
int io_write1(x3_image *img, const void *buf, size_t len, uint64_t off);
int io_write_until(x3_image *img, const struct iovec *iov, int count, uint64_t off, uint64_t *end);
int io_barrier(x3_image *img);
void io_changed(x3_image *img);
int injected(x3_image *img, int kind);
void trace(x3_image *img, uint64_t kind, uint64_t off, const struct iovec *iov, int count);

/* --- cache.c --- */

void cache_free(x3_image *img);
void cache_trim(x3_image *img);
struct block *block_find(x3_image *img, uint32_t nr);
struct block *block_get(x3_image *img, uint32_t nr);
struct block *block_fresh(x3_image *img, uint32_t nr);
void *block_change(x3_image *img, struct block *b, uint32_t offset, uint32_t length);
void block_forget(x3_image *img, uint32_t nr);
struct mark undo_mark(const x3_image *img);
void undo_to(x3_image *img, struct mark mark);
void *grow(x3_image *img, void *array, size_t *cap, size_t need, size_t size);
void *try_grow(void *array, size_t *cap, size_t need, size_t size);

/* --- operation.c --- */

/*
 * The statement after QUERY or CHANGE is one operation, under the lock. It stores its result in op.result, and is
 * repeated after an ENOSPC that a commit can cure. `return op_finish(&op)` must follow.
 */
#define OPERATION(image, ino, changing)                                       \
	struct op op;                                                         \
	for (op_begin(&op, image, ino, changing); op_again(&op); op_end(&op)) \
		if (setjmp(op.escape) == 0)
#define QUERY(image) OPERATION(image, 0, CHANGES_NOTHING)
#define CHANGE(image) OPERATION(image, 0, CHANGES)
#define GO_ON(image) OPERATION(image, 0, GOES_ON)
#define CHANGE_DATA(image, ino) OPERATION(image, ino, CHANGES) /* waits while *ino* is being truncated */
void image_lock(x3_image *img);
bool is_suspended(const x3_image *img);
void op_begin(struct op *op, x3_image *img, uint32_t ino, enum change_kind changing);
bool op_again(struct op *op);
void op_end(struct op *op);
int64_t op_finish(struct op *op);
void fail(x3_image *img, int error, const char *format, ...) __attribute__((noreturn, cold, format(printf, 3, 4)));
void abort_image(x3_image *img, int error, const char *format, ...) __attribute__((cold, format(printf, 3, 4)));

/* --- lazy_free.c --- */

void doom(x3_image *img, uint32_t ino, uint64_t blocks);
bool doomed_free_some(x3_image *img);
void doomed_make_room(x3_image *img);
void let_others(void);

/* --- journal.c --- */

int journal_load(x3_image *img);
bool journal_has(const x3_image *img, uint32_t nr, uint32_t count);
int journal_start(x3_image *img);
int journal_empty(x3_image *img);
int journal_finish(x3_image *img);
int journal_write_super(x3_image *img, uint32_t start);
void journal_mark_damaged(x3_image *img);

/* --- commit.c --- */

bool committing_begin(x3_image *img);
int committing_end(x3_image *img, int error);
int barrier_failed(x3_image *img, int error);
int commit_until(x3_image *img, uint32_t tid);
int checkpoint_now(x3_image *img);
bool tid_after(uint32_t a, uint32_t b);

/* --- host_space.c --- */

int room_start(x3_image *img);
void room_for(x3_image *img, struct block *b);
void room_facts(const x3_image *img, struct x3_facts *out);
bool room_is_lacking(int error);
int room_judge(x3_image *img, int error);
bool room_refuses(x3_image *img, enum change_kind kind);

/* --- give_back.c --- */

void give_back_start(x3_image *img);
void give_back(x3_image *img, const struct runs *runs);

/* --- unsynced.c --- */

int unsynced_write(x3_image *img, uint32_t ino, const struct iovec *iov, int count, uint64_t off);
void unsynced_begin(x3_image *img, uint64_t nr);
int unsynced_end(x3_image *img, int error, uint64_t nr);
uint64_t io_failures(x3_image *img);
bool unsynced_is_much(x3_image *img);
bool unsynced_is_unjudged(x3_image *img);
bool unsynced_judge(x3_image *img);
int unsynced_home(x3_image *img);
void unsynced_free(x3_image *img);

/* --- nowait.c --- */

bool in_a_hurry(void);
void ask_commit(x3_image *img);
void look_ahead(x3_image *img);
void leave_some(x3_image *img, uint64_t count);

/* --- super.c --- */

int super_load(x3_image *img);
void groups_load(x3_image *img);
void super_begin(x3_image *img);
void super_mark_damaged(x3_image *img);
uint32_t group_copies(const x3_image *img, uint32_t group);
void super_need(x3_image *img, uint32_t compat, uint32_t ro_compat);
void super_count(x3_image *img, int32_t blocks, int32_t inodes);

/* --- replay.c --- */

struct patch *table_find(const struct table *table, uint32_t nr);
struct patch *table_put(struct table *table, uint32_t nr);
void table_free(struct table *table);
int patches_read(x3_image *img, char *buf, size_t len, uint64_t off);
char *patch_data(x3_image *img, uint32_t nr, int *error);
bool journal_is_in_use(const x3_image *img);
int replay_find(x3_image *img);
int patches_home(x3_image *img, uint32_t most);

/* --- redo_log.c, redo.c --- */

void redo_layout(x3_image *img);
int redo_start(x3_image *img);
void redo_drop(x3_image *img);
void redo_spoil(x3_image *img);
int redo_note(x3_image *img, bool may_fail);
void redo_flush(x3_image *img);
bool redo_is_lost(x3_image *img);
bool redo_is_much(x3_image *img);

/* --- redo_read.c --- */

int redo_find(x3_image *img);
void redo_forget(x3_image *img);
int redo_show(x3_image *img);
int redo_commit(x3_image *img);

/* --- alloc.c --- */

struct ext2_group_desc *group_get(x3_image *img, uint32_t group);
bool block_is_free(x3_image *img, uint32_t nr);
void check_block(x3_image *img, uint32_t nr, uint32_t count);
uint32_t alloc_blocks(x3_image *img, uint32_t goal, uint32_t want, uint32_t *got);
uint32_t alloc_block(x3_image *img, uint32_t goal);
void free_blocks(x3_image *img, uint32_t nr, uint32_t count);
void held_undo(x3_image *img, size_t n);
void held_release(x3_image *img, struct runs *runs, bool logged_too);
uint32_t alloc_inode(x3_image *img, uint32_t dir, bool is_dir);
void free_inode(x3_image *img, uint32_t ino, bool is_dir);
uint32_t inode_goal(x3_image *img, uint32_t ino);

/* --- inode.c --- */

int64_t now_ns(void);
struct inode inode_at(x3_image *img, uint32_t ino);
struct inode inode_get(x3_image *img, uint32_t ino);
struct inode inode_change(x3_image *img, uint32_t ino, bool lasting);
uint64_t inode_size_of(const struct inode *in);
void inode_set_size(x3_image *img, struct inode *in, uint64_t size);
void inode_add_blocks(x3_image *img, struct inode *in, int64_t count);
bool inode_is_mapped(x3_image *img, const struct inode *in);
void inode_attr(x3_image *img, const struct inode *in, struct x3_attr *out);
bool inode_birth(x3_image *img, const struct inode *in, int64_t *ns);
void inode_set_flags(x3_image *img, struct inode *in, uint32_t flags);
void inode_times(x3_image *img, struct inode *in, uint32_t what, int64_t ns);
bool inode_atime_is_due(x3_image *img, const struct inode *in, int64_t now, bool always);
#define CTIME 32 /* beside X3_ATIME and X3_MTIME */
struct inode inode_make(x3_image *img, uint32_t dir, const struct x3_new *new_inode);
enum fate { LIVES, IS_KEPT, HAS_REST }; /* of an inode that lost a link; HAS_REST: an orphan to be freed */
enum fate inode_drop_link(x3_image *img, uint32_t ino, bool keep);
void orphan_add(x3_image *img, struct inode *in);
void orphan_check(x3_image *img);
void orphan_remove(x3_image *img, struct inode *in);
bool inode_delete_some(x3_image *img, uint32_t ino, bool listed);

/* --- data.c --- */

extern const char zero[BLOCK_MAX];

struct extent {
	uint64_t at; /* position in the file, in blocks */
	uint32_t nr; /* 0: a hole */
	uint32_t count;
};
struct extent data_map(x3_image *img, const struct inode *in, uint64_t at, uint64_t most);
struct block *data_append_meta(x3_image *img, struct inode *in, uint64_t at);
uint64_t data_write(x3_image *img, uint32_t ino, const char *buf, uint64_t len, uint64_t off, bool holes);
int64_t data_segment(x3_image *img, uint32_t ino, uint64_t from, uint64_t *stop);
uint64_t data_size_max(uint32_t bits);

/* --- free_data.c --- */

bool data_free_from(x3_image *img, struct inode *in, uint64_t first);
int data_clear_late(x3_image *img);
bool data_truncate(x3_image *img, uint32_t ino, uint64_t size);
bool data_truncate_more(x3_image *img, uint32_t ino);
bool data_punch(x3_image *img, uint32_t ino, uint64_t off, uint64_t len);

/* --- dir.c --- */

#define RECORD(name_len) (((name_len) + 8 + 3) & ~3u) /* the length of a directory entry */
typedef struct ext2_dir_entry_2 entry;
uint32_t entry_length(const x3_image *img, const entry *e);
void entry_set_length(const x3_image *img, entry *e, uint32_t length);
struct block *dir_block(x3_image *img, const struct inode *dir, uint64_t at);
uint64_t dir_blocks(x3_image *img, const struct inode *dir);
entry *dir_entry(x3_image *img, struct block *b, uint32_t offset);
int64_t dir_put(x3_image *img, struct block *b, const char *name, uint32_t len, uint32_t ino, uint8_t type);
struct block *dir_append(x3_image *img, struct inode *dir, uint32_t *at);
struct x3_place dir_insert(x3_image *img, uint32_t dir, const char *name, uint32_t len, uint32_t ino, uint32_t mode,
			   uint32_t hint);
struct x3_place dir_find(x3_image *img, const struct inode *dir, const char *name, uint32_t len, struct x3_place guess,
			 uint32_t ino);
bool dir_find_in(x3_image *img, const struct inode *dir, uint32_t at, const char *name, uint32_t len, uint32_t ino,
		 struct x3_place *where);
#define ANY_INO 0 /* for dir_find_in() */
bool dir_lookup(x3_image *img, uint32_t dir, const char *name, uint32_t len, struct x3_found *out);
void dir_remove(x3_image *img, uint32_t dir, struct x3_place where);
void dir_replace(x3_image *img, uint32_t dir, struct x3_place where, uint32_t ino, uint32_t mode);
bool dir_is_empty(x3_image *img, uint32_t dir);
entry *dir_parent(x3_image *img, uint32_t dir, struct block **block);
bool dir_is_above(x3_image *img, uint32_t ino, uint32_t dir);
void dir_set_parent(x3_image *img, uint32_t dir, uint32_t parent);
void dir_init(x3_image *img, struct inode *dir, uint32_t parent);
int64_t dir_list(x3_image *img, uint32_t dir, uint64_t *cursor, char *buf, uint64_t cap);

/* --- htree.c --- */

bool htree_usable(x3_image *img, const struct inode *dir);
uint32_t htree_find(x3_image *img, const struct inode *dir, const char *name, uint32_t len);
bool htree_lookup(x3_image *img, const struct inode *dir, const char *name, uint32_t len, struct x3_place *where);
bool htree_make(x3_image *img, struct inode *dir);
struct x3_place htree_insert(x3_image *img, struct inode *dir, const char *name, uint32_t len, uint32_t ino,
			     uint8_t type);

/* --- xattr.c --- */

bool xattr_any(x3_image *img, const struct inode *in);
bool xattr_rules(x3_image *img, const struct inode *in); /* whether it has ACLs, or attributes of "security" */
int64_t xattr_list(x3_image *img, uint32_t ino, char *buf, uint64_t cap);
int64_t xattr_get(x3_image *img, uint32_t ino, const char *name, uint32_t len, char *buf, uint64_t cap);
void xattr_set(x3_image *img, uint32_t ino, const char *name, uint32_t len, const char *value, uint64_t size, int flags,
	       bool remove);
void xattr_free_block(x3_image *img, struct inode *in);
