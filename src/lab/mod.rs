//! The lab: what power cuts, failing disks and damaged files do to a data directory.
//!
//! ```text
//! workload ─▶ engine ─▶ disk.rs ─ tells ─▶ Recorder ─▶ steps ─▶ Volume ─ cut at any step ─▶ Image ─▶ recover ─▶ oracle
//! ```
//!
//! The engine runs on real files. A thread in the lab has a [`Recorder`], and so have the threads it starts; `disk.rs` tells it
//! of each operation. The engine's own trace of effects (`apply`, `reply`) goes into the same list. From the list [`volume`]
//! makes what a disk could hold after a cut at any place: it knows apart what was written and what was synced, for bytes and
//! for names. Such an image is laid down as real files again, recovered by the real recovery, and compared with what the
//! [`workload`] was told: see `power`. `failing` makes operations fail, `damage` changes bytes.
//!
//! The enumeration is complete for a workload; the workload is a function of its seed. One thread of the engine, that of the
//! zeros ahead of the log, takes its turn as it likes, so two recordings of a seed may differ in where its writes stand; a
//! failure therefore prints the steps before the cut.
//!
//! `KISS_LAB_SEEDS` sets how many seeds are tried.

mod damage;
mod failing;
mod power;
mod volume;
mod workload;

use crate::disk::DiskOp;
use crate::faults::Bug;
use parking_lot::Mutex;
use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use volume::{Image, Volume};

/// What the threads of one lab share.
#[derive(Clone, Debug, Default)]
struct Context {
    recorder: Option<Arc<Recorder>>,
    bug: Option<Bug>,
}

thread_local! {
    static CONTEXT: RefCell<Option<Context>> = const { RefCell::new(None) };
}

fn context() -> Option<Context> {
    CONTEXT.with_borrow(Clone::clone)
}

fn recorder() -> Option<Arc<Recorder>> {
    context()?.recorder
}

/// The bug this thread was given, if it is in a lab.
pub fn chosen_bug() -> Option<Bug> {
    context()?.bug
}

/// Takes the lab along to a thread about to be started.
pub fn inherited(run: impl FnOnce() + Send + 'static) -> impl FnOnce() + Send + 'static {
    let context = context();
    move || {
        let recorder = context.as_ref().and_then(|context| context.recorder.clone());
        CONTEXT.set(context);
        let _told = TellPanic(recorder);
        run();
    }
}

/// Notes that a thread of the engine ended in a panic: the engine itself only says so in its log.
struct TellPanic(Option<Arc<Recorder>>);

impl Drop for TellPanic {
    fn drop(&mut self) {
        if let Some(recorder) = &self.0
            && std::thread::panicking()
        {
            recorder.recording.lock().has_panicked = true;
        }
    }
}

/// Runs something in a lab.
fn within<T>(recorder: Option<&Arc<Recorder>>, bug: Option<Bug>, run: impl FnOnce() -> T) -> T {
    listen_to_effects();
    let before = CONTEXT.replace(Some(Context { recorder: recorder.cloned(), bug }));
    let result = run();
    CONTEXT.set(before);
    result
}

/// Tells the recorder of an operation on a name.
pub fn tell(op: DiskOp<'_>) -> io::Result<()> {
    recorder().map_or(Ok(()), |recorder| recorder.tell(op))
}

/// What a file that was just opened tells from now on.
pub fn watch(path: &Path) -> Option<Watched> {
    let recorder = recorder()?;
    let recording = recorder.recording.lock();
    let inode = recording.volume.find(recorder.below(path)?)?;
    let seen = Arc::new(AtomicUsize::new(recording.errors_of(inode)));
    drop(recording);
    Some(Watched { recorder, inode, seen })
}

/// A file's side of the lab.
#[derive(Clone, Debug)]
pub struct Watched {
    recorder: Arc<Recorder>,
    inode: usize,
    /// Failed syncs of the file that this open file was told of: Linux tells each one once, whoever asked.
    seen: Arc<AtomicUsize>,
}

impl Watched {
    /// Tells the recorder of an operation on the file, before it is done.
    pub fn tell(&self, op: DiskOp<'_>, file: &std::fs::File) -> io::Result<()> {
        if let DiskOp::Sync = op {
            // What was written through a mapping is being synced too.
            self.recorder.look_at_rows();
        }
        let mut recording = self.recorder.recording.lock();
        let inode = self.inode;
        let mut failure = recording.failure(op);
        if let DiskOp::Sync = op
            && self.seen.swap(recording.errors_of(inode), Ordering::Relaxed) < recording.errors_of(inode)
        {
            failure.get_or_insert(Failure::Device);
        }
        match op {
            DiskOp::Write { at, bytes } => {
                if let Some(Failure::Short) = failure {
                    let part = &bytes[..bytes.len() / 2];
                    recording.push(Step::Write { inode, at, bytes: part.into() });
                    file.write_all_at(part, at)?;
                } else if failure.is_none() {
                    recording.push(Step::Write { inode, at, bytes: bytes.into() });
                }
            }
            DiskOp::SetLength(bytes) if failure.is_none() => recording.push(Step::SetLength { inode, bytes }),
            DiskOp::Allocate { at, bytes } if failure.is_none() && at + bytes > recording.volume.length(inode) => {
                recording.push(Step::SetLength { inode, bytes: at + bytes });
            }
            DiskOp::Sync if failure.is_none() => recording.push(Step::Sync(inode)),
            // After a sync that failed the system may have forgotten that these pages were never written.
            DiskOp::Sync => {
                recording.push(Step::Forget(inode));
                *recording.sync_errors.entry(inode).or_default() += 1;
                self.seen.store(recording.errors_of(inode), Ordering::Relaxed);
            }
            _ => {}
        }
        failure.map_or(Ok(()), |failure| Err(failure.error()))
    }
}

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// EIO.
    Device,
    /// ENOSPC.
    Full,
    /// EMFILE.
    Files,
    /// Half of a write, then ENOSPC.
    Short,
}

impl Failure {
    /// The ways in which an operation can fail.
    fn of(op: DiskOp<'_>) -> &'static [Self] {
        match op {
            DiskOp::Open(_) => &[Self::Device, Self::Files],
            DiskOp::Create(_) | DiskOp::OpenOrCreate(_) => &[Self::Device, Self::Files, Self::Full],
            DiskOp::Write { .. } => &[Self::Device, Self::Full, Self::Short],
            DiskOp::Allocate { .. } | DiskOp::Rename { .. } | DiskOp::CreateDir(_) | DiskOp::Sync => {
                &[Self::Device, Self::Full]
            }
            DiskOp::List(_) => &[Self::Device, Self::Files],
            DiskOp::Read | DiskOp::SetLength(_) | DiskOp::Remove(_) | DiskOp::RemoveDir(_) | DiskOp::SyncDir(_) => {
                &[Self::Device]
            }
        }
    }

    fn error(self) -> io::Error {
        match self {
            Self::Device => rustix::io::Errno::IO,
            Self::Files => rustix::io::Errno::MFILE,
            Self::Full | Self::Short => rustix::io::Errno::NOSPC,
        }
        .into()
    }
}

/// Not writes: where they fail, blocks were promised.
fn asks_for_blocks(op: DiskOp<'_>) -> bool {
    matches!(op, DiskOp::Allocate { .. } | DiskOp::Create(_) | DiskOp::OpenOrCreate(_) | DiskOp::CreateDir(_))
}

/// What fails.
#[derive(Clone, Copy, Debug)]
enum Plan {
    /// One operation: how many are before it, and in which of its ways.
    One { after: usize, way: usize },
    /// Whatever asks for blocks after so many operations, so many times.
    Full { after: usize, times: usize },
}

/// Something that was done.
#[derive(Clone, Debug)]
enum Step {
    Create(PathBuf),
    CreateDir(PathBuf),
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    Remove(PathBuf),
    RemoveDir(PathBuf),
    SyncDir(PathBuf),
    Write {
        inode: usize,
        at: u64,
        bytes: Arc<[u8]>,
    },
    SetLength {
        inode: usize,
        bytes: u64,
    },
    Sync(usize),
    /// A sync that failed: what was not durable never will be.
    Forget(usize),
    /// A record was applied: everybody can see it.
    Applied(u64),
    /// A command was answered.
    Replied,
    /// Even the relaxed modes must keep this revision from here on.
    Kept(u64),
}

/// Writes down what is done below a directory, and makes it fail.
#[derive(Debug)]
struct Recorder {
    root: PathBuf,
    recording: Mutex<Recording>,
}

#[derive(Debug)]
struct Recording {
    steps: Vec<Step>,
    /// As the running system sees it.
    volume: Volume,
    /// Operations so far that could have failed, and in how many ways each could.
    ways: Vec<usize>,
    plan: Option<Plan>,
    /// What failed.
    failed: Vec<String>,
    has_panicked: bool,
    /// Failed syncs, by file.
    sync_errors: HashMap<usize, usize>,
}

impl Recording {
    fn errors_of(&self, inode: usize) -> usize {
        self.sync_errors.get(&inode).copied().unwrap_or(0)
    }

    fn push(&mut self, step: Step) {
        self.volume.apply(&step);
        self.steps.push(step);
    }

    fn failure(&mut self, op: DiskOp<'_>) -> Option<Failure> {
        let ways = Failure::of(op);
        let number = self.ways.len();
        self.ways.push(ways.len());
        let failure = match self.plan? {
            Plan::One { after, way } if number == after => *ways.get(way)?,
            Plan::Full { after, times } if number >= after && self.failed.len() < times && asks_for_blocks(op) => {
                Failure::Full
            }
            _ => return None,
        };
        let what = match op {
            DiskOp::Write { at, bytes } => format!("Write of {} at {at}", bytes.len()),
            op => format!("{op:?}"),
        };
        self.failed.push(format!("{failure:?} in operation {number}, {what}"));
        Some(failure)
    }
}

impl Recorder {
    /// For a directory that holds what `image` says.
    fn new(root: &Path, image: &Image, plan: Option<Plan>) -> Arc<Self> {
        Self::going_on(root, Volume::holding(image), plan)
    }

    /// For a directory on a disk that holds this, and may not have all of it for good.
    fn going_on(root: &Path, volume: Volume, plan: Option<Plan>) -> Arc<Self> {
        let recording = Recording {
            steps: Vec::new(),
            volume,
            ways: Vec::new(),
            plan,
            failed: Vec::new(),
            has_panicked: false,
            sync_errors: HashMap::new(),
        };
        Arc::new(Self { root: root.to_owned(), recording: Mutex::new(recording) })
    }

    /// The path within the directory; `None` for what is outside.
    fn below<'a>(&self, path: &'a Path) -> Option<&'a Path> {
        path.strip_prefix(&self.root).ok()
    }

    fn note(&self, step: Step) {
        self.recording.lock().push(step);
    }

    fn tell(&self, op: DiskOp<'_>) -> io::Result<()> {
        let mut recording = self.recording.lock();
        let owned = |path: &Path| self.below(path).map(Path::to_owned);
        let step = match op {
            DiskOp::Create(path) => owned(path).map(Step::Create),
            DiskOp::OpenOrCreate(path) => {
                owned(path).filter(|path| recording.volume.find(path).is_none()).map(Step::Create)
            }
            DiskOp::Rename { from, to } => owned(from).zip(owned(to)).map(|(from, to)| Step::Rename { from, to }),
            DiskOp::Remove(path) => owned(path).filter(|path| recording.volume.find(path).is_some()).map(Step::Remove),
            DiskOp::CreateDir(path) => owned(path).map(Step::CreateDir),
            DiskOp::RemoveDir(path) => owned(path).map(Step::RemoveDir),
            DiskOp::SyncDir(path) => owned(path).map(Step::SyncDir),
            _ => None,
        };
        if let Some(failure) = recording.failure(op) {
            return Err(failure.error());
        }
        step.into_iter().for_each(|step| recording.push(step));
        Ok(())
    }

    /// Notes what was written to rows since the last look. Rows are written through a mapping, of which nobody is told.
    fn look_at_rows(&self) {
        let mut recording = self.recording.lock();
        for (path, inode) in recording.volume.files_named("rows.f32") {
            let Ok(now) = std::fs::read(self.root.join(path)) else { continue };
            let known = recording.volume.content(inode);
            let changed: Vec<(usize, Vec<u8>)> = now
                .chunks(volume::SECTOR_BYTES)
                .enumerate()
                .filter(|(n, piece)| known.get(n * volume::SECTOR_BYTES..).is_some_and(|k| !k.starts_with(piece)))
                .map(|(n, piece)| (n * volume::SECTOR_BYTES, piece.to_vec()))
                .collect();
            for (at, bytes) in changed {
                recording.push(Step::Write { inode, at: at as u64, bytes: bytes.into() });
            }
        }
    }

    fn steps(&self) -> Vec<Step> {
        self.recording.lock().steps.clone()
    }
}

/// Puts what the engine tells of its effects into the recording of the thread that tells it.
struct Effects;

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Effects {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        if event.metadata().target() != crate::engine::sequencer::EFFECTS {
            return;
        }
        let Some(recorder) = recorder() else { return };
        let mut effect = Effect::default();
        event.record(&mut effect);
        match effect.name.as_str() {
            "apply" => {
                recorder.look_at_rows();
                recorder.note(Step::Applied(effect.last));
            }
            "reply" => recorder.note(Step::Replied),
            _ => {}
        }
    }
}

#[derive(Default)]
struct Effect {
    name: String,
    last: u64,
}

impl tracing::field::Visit for Effect {
    fn record_u64(&mut self, field: &tracing::field::Field, value: u64) {
        if field.name() == "last" {
            self.last = value;
        }
    }

    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.name = format!("{value:?}");
        }
    }
}

fn listen_to_effects() {
    use tracing_subscriber::layer::SubscriberExt;
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let only = tracing_subscriber::filter::Targets::new()
            .with_target(crate::engine::sequencer::EFFECTS, tracing::Level::TRACE);
        tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Effects).with(only)).unwrap();
    });
}

/// Random enough, and the same for the same seed.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // SplitMix64 (Steele, Lea, Flood 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        // The cast: below `end`.
        (self.next() % end as u64) as usize
    }

    fn is_lucky(&mut self) -> bool {
        self.next() & 1 == 1
    }
}

/// How many seeds to try.
fn seeds() -> std::ops::Range<u64> {
    1..1 + std::env::var("KISS_LAB_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(1)
}

/// A directory in memory where there is such a thing: a sync then costs nothing.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}
