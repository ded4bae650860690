/*
 * What the parts of the engine share.
 *
 *   io.c         the image's file, with traces and injected faults
 *   cache.c      the cache of metadata blocks, and their undo
 *   operation.c  operations: the lock, another attempt, failure
 *   journal.c    the journal's place, superblock, begin and end
 *   commit.c     commit and checkpoint
 *   replay.c     what a crash has left in the journal
 *   redo.c       the log of what is not committed yet, which outlives the process
 *   alloc.c      blocks and inodes: bitmaps, counts, blocks held back after they were freed
 *   inode.c      inodes, their attributes, the orphan list, deletion
 *   lazy_free.c  freeing what has lost its name, bit by bit
 *   data.c       block pointers; reading, writing, truncating
 *   dir.c        names in directories; htree.c: indexed ones
 *   xattr.c      extended attributes
 *   host_space.c room on the disk that the image is on
 *   unsynced.c   file data that is not on disk yet, and may be refused there
 *   super.c      the superblock: features and geometry
 *   open.c       opening, closing, letting go for a while
 *   engine.c     the other entry points
 *
 * All metadata is changed in the cache, through block_change() alone: it keeps the old bytes for the
 * undo and puts the block into the running transaction. A cached block never moves while an operation
 * runs, so pointers into it stay good until the operation's end.
 *
 * Errors do not return: fail() jumps to the end of the operation, which is undone there. So whatever
 * returns has succeeded. Only what runs outside of operations (the I/O at the bottom, commit,
 * checkpoint) returns -errno.
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
#error "ext3 is little-endian, and this engine reads it as it is"
#endif

#define NS 1000000000LL
#define BLOCK_MAX 65536u
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))

/* A cached metadata block. */
struct block {
	uint32_t nr;
	uint32_t flags;
	struct block *next; /* with the same hash */
	char *logged;       /* LOGGED: what the log holds, if *data* is newer by now */
	char data[];
};
#define DIRTY 1        /* belongs to the running transaction */
#define LISTED 2       /* stands in img->dirty (maybe no longer DIRTY) */
#define LOGGING 4      /* belongs to the transaction that is being committed */
#define LOGGED 8       /* committed, but not home yet */
#define PINNED 16      /* never evicted */
#define USED 32        /* since the clock's hand came by */
#define HAS_ROOM 128   /* on the disk */
#define WAS_ESCAPED 64 /* LOGGING: it begins with the journal's magic number */

/* Runs of blocks. */
struct run {
	uint32_t start, count;
};
struct runs {
	struct run *run;
	size_t n, cap;
};

/* What an operation has changed so far; see block_change(). */
struct change {
	struct block *block;
	uint32_t offset, length; /* length 0: the block was fresh, and is not needed any more */
	size_t old;              /* where its old bytes are in undo.bytes */
};
struct mark {
	size_t changes, bytes, held;
};

/* GOES_ON: the rest of a change that has begun. */
enum change_kind { CHANGES_NOTHING, CHANGES, GOES_ON };

/* What is to be known of a block: in img->patches, where its content is while that is not home. */
struct patch {
	uint32_t nr;
	uint32_t source; /* the block of the image that has it; 0: only *data* */
	bool used, escaped;
	bool home; /* and waits for others to be */
	char *data;
};
struct table { /* open addressing; of a power of two */
	struct patch *slot;
	uint32_t mask, n;
};

/* Checksums of file data: see unsynced.c. */
struct sums {
	struct table table;
	bool broken; /* there was no memory for all of them */
};
#define LOST_MAX 64
struct edge { /* a unit that was written to in part, and what it has since */
	uint64_t unit;
	bool known;
	char data[4096];
};

/* One operation: lives on the stack of the entry point. */
struct op {
	x3_image *img;
	enum change_kind changing;
	bool starved; /* of blocks, while there are some held back */
	uint32_t ino; /* not while this one is being truncated */
	int tries, error;
	size_t held_before; /* img->held.n at its beginning */
	uint64_t rest;      /* blocks that an inode still has of which a part was freed */
	struct {
		/* Bytes of file data to be zeroed once the operation has its record: data_clear_late() */
		uint64_t off;
		uint32_t len, ino;
	} late;
	int64_t result;
	jmp_buf escape;
};

/* A file that is being truncated in several steps: by who called x3_truncate(), on whose stack this is. */
struct truncation {
	uint32_t ino;
	struct truncation *next;
};

/* An inode without a name that is freed bit by bit. */
struct doomed {
	uint32_t ino;
	uint64_t blocks; /* that it still has */
};

struct x3_image {
	/* the file */
	int fd, trace_fd;
	int meminfo; /* /proc/meminfo: a daemon that serves sees no /proc any more; -1: not known */
	uint32_t debug;
	bool read_only;
	pthread_mutex_t io_lock; /* of what is below, up to the blank line */
	uint64_t barriers, bytes_written;
	pthread_mutex_t sync_lock; /* of barriers, one at a time, and of their numbers */
	uint64_t barrier_nr;
	uint64_t writes; /* so far; atomic */
	uint64_t synced; /* as many as the last barrier covers, if it has succeeded; UINT64_MAX: not known */
	int inject_kind, inject_error, inject_sticky;
	int64_t inject_nth;
	bool inject_holds;
	pthread_cond_t inject_wake;

	pthread_mutex_t sums_lock; /* of what is below, up to the blank line */
	struct sums sums, syncing; /* syncing: those that the running barrier covers, or the last, which has failed */
	uint64_t failures;         /* of barriers; atomic */
	int failure;               /* -errno of the last one */
	bool unjudged;             /* that was told, and nothing done about it yet */

	pthread_mutex_t lock; /* of everything below */
	pthread_cond_t wake;  /* a commit has ended, a reader has left, a truncation is complete */
	struct op *op;        /* the running one */
	int aborted;
	char message[256];

	/* geometry */
	uint32_t bs, bits; /* block size, its logarithm */
	uint32_t inode_size, extra_isize, inodes_per_group, blocks_per_group, first_block;
	uint32_t groups, gd_blocks, blocks, inodes, first_ino;
	uint64_t size_max, overhead;
	bool filetype, dir_index;
	uint64_t cache_bytes;
	struct block *sb_block, **gd_block;
	struct ext2_super_block *sb;
	uint64_t random;        /* for i_generation */
	struct x3_facts opened; /* as it was when opened */

	/* cache */
	struct block **bucket, **all; /* all: for the clock */
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
	struct runs held;          /* freed in it */
	uint64_t held_now;         /* how many blocks these are */
	volatile uint32_t pressed; /* whoever is in a hurry shall not change anything before a commit */
	uint32_t changed[4096];    /* by a hash of the inode: tid of the last change of anything */
	uint32_t lasting[4096];    /* and of anything but its times */

	/* the journal */
	uint32_t *jmap, jlen, jfirst, jhead;
	uint32_t *jsorted, jblocks; /* the blocks of its inode: jmap itself, if that is in order */
	uint32_t jend;              /* where our log ends, before the end of the journal */
	char jsb[1024];
	bool committing;     /* or checkpointing: by one thread at a time */
	uint32_t atoms;      /* x3_begin without x3_end: no transaction ends */
	bool suspended;      /* everybody waits, but who resumes it */
	bool resuming, dead; /* dead: that failed */
	pthread_t resumer;
	uint32_t committed;
	struct block **logging; /* the transaction being committed */
	size_t nlogging, logging_cap;
	char *log; /* and its image as it goes to the journal */
	size_t log_size;
	struct runs held_logging;
	struct block **logged; /* everything that is not home yet */
	size_t nlogged, logged_cap;
	struct runs held_logged; /* freed and committed, but still in the log */
	uint64_t commits, checkpoints;

	/* recovery: see replay.c */
	struct table patches;
	uint32_t mounted_at; /* s_mtime */
	bool has_errors;     /* s_state tells of some */
	uint32_t replayed;   /* transactions that the journal had */
	bool stale;          /* whatever it has, somebody did without it */
	uint64_t redone;     /* records that the redo log had */

	/* the redo log */
	struct {
		bool on;
		uint64_t session;
		uint32_t blocks;          /* in the ring */
		uint32_t tid;             /* whose records are written */
		uint32_t count, previous; /* how many there are, and of the transaction before */
		/* In the ring, counted on and on: where the next record goes, the first one of *tid* is, and the first
		   one that is needed. */
		uint64_t head, first, needed;
		char *buf; /* the next record */
		size_t used, cap;
		uint32_t nr; /* the block of its last piece */
		bool broken; /* there was no memory for all of it */
		bool lost;   /* see redo.c */
		uint32_t lost_tid;
		struct found { /* by the recovery: the records of one transaction */
			char *data;
			size_t length, cap;
		} found[2];
		struct table seen; /* the blocks that one of them has, while it is checked */
	} redo;
	uint32_t due; /* the transaction that should be committed soon */
	bool woken;   /* nobody shall wait for that any more */

	/* allocation */
	char **hold; /* per group: a bitmap of its free blocks that may not be used yet, or NULL */
	uint64_t nheld;

	/* room on the disk */
	bool in_memory, no_fallocate; /* in_memory: there is always room */
	bool gives_back;              /* what is freed to its disk */
	int stalled;                  /* errno: what is logged or dirty waits for room */
	bool excused;                 /* that began between x3_begin and x3_end */
	int64_t tried_ns, saved_ns;
	bool unsure;                    /* whether the disk takes what it has let us write */
	bool tells_early;               /* an error of fdatasync may be told by write, and then not again */
	bool data_lost;                 /* it has not, and nobody has it any more */
	uint32_t lost[LOST_MAX], nlost; /* of which inodes */
	struct edge edge[2];
	int edge_turn;    /* which has been read last */
	uint64_t patched; /* writes to what is kept in img->patches */

	/* see track.c */
	struct {
		bool on, beyond; /* beyond: something was written that has no bit */
		uint64_t *map;
	} track;

	/* data */
	uint32_t readers; /* threads that read file data without the lock */
	bool draining;    /* wait for them */
	struct truncation *truncations;

	/* Inodes on the orphan list that are freed bit by bit: see doom() */
	struct doomed *doomed;
	size_t ndoomed, doomed_cap;
	uint64_t doomed_blocks; /* that all of them still have */
	bool attended;          /* somebody comes to x3_wait() again and again */

	struct {
		uint32_t ino, previous;
	} orphan_hint[4096]; /* who stands before it in the orphan list, probably */
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
 * The statement behind QUERY or CHANGE is one operation, under the lock; `return op_finish(&op)` follows.
 * It puts its result into op.result, and is done again after an ENOSPC that a commit can help.
 */
#define OPERATION(image, ino, changing)                                       \
	struct op op;                                                         \
	for (op_begin(&op, image, ino, changing); op_again(&op); op_end(&op)) \
		if (setjmp(op.escape) == 0)
#define QUERY(image) OPERATION(image, 0, CHANGES_NOTHING)
#define CHANGE(image) OPERATION(image, 0, CHANGES)
#define GO_ON(image) OPERATION(image, 0, GOES_ON)
#define CHANGE_DATA(image, ino) OPERATION(image, ino, CHANGES) /* not while it is being truncated */
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
	uint64_t at; /* in the file, in blocks */
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

int64_t xattr_list(x3_image *img, uint32_t ino, char *buf, uint64_t cap);
int64_t xattr_get(x3_image *img, uint32_t ino, const char *name, uint32_t len, char *buf, uint64_t cap);
void xattr_set(x3_image *img, uint32_t ino, const char *name, uint32_t len, const char *value, uint64_t size, int flags,
	       bool remove);
void xattr_free_block(x3_image *img, struct inode *in);
