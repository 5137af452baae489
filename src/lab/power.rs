//! Power cuts: at every step of a workload, with every kind of loss; and again at every step of the recovery from each.
//!
//! What would break: an answer before its sync, a file whose name was never made durable, half a batch, a revision that comes
//! back as something else, a recovery that does not survive a cut of its own.

use super::volume::{Cut, Image, Volume};
use super::workload::{self, Model, Oracle, Settings};
use super::{Random, Recorder, Step, scratch, seeds, within};
use crate::engine::Engine;
use crate::faults::Bug;
use crate::revision::Revision;
use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

/// What a recovery came to.
#[derive(Debug)]
pub(super) struct Found {
    /// The newest revision, given up ones included.
    head: u64,
    /// The newest one that is there.
    pub last: u64,
    pub model: Model,
    pub records: Vec<(u64, String)>,
    /// Whether all from `last` to `head` are known to be lost.
    is_gap_known: bool,
    /// Whether nothing is left behind the end of the log.
    is_clean: bool,
}

pub(super) fn look(dir: &Path) -> Result<Found, String> {
    let recovered = workload::recovered(dir).map_err(|e| e.to_string())?;
    let (log, head) = (&recovered.wal.log, recovered.wal.wal.head());
    let gap = log.gaps().into_iter().find(|gap| gap.to == head);
    let last = gap.map_or(head, |gap| gap.from.prev());
    Ok(Found {
        head: head.0,
        last: last.0,
        model: Model::of(&recovered.state),
        records: workload::history(log, head).map_err(|e| e.to_string())?,
        is_clean: recovered.wal.wal.is_clean().map_err(|e| e.to_string())?,
        is_gap_known: (last.next().0..head.0).take(100).all(|r| log.is_lost(Revision(r))),
    })
}

/// What must hold wherever the power was cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Promise {
    /// This revision is there.
    pub floor: u64,
    /// No revision up to here is given out again.
    pub seen: u64,
}

impl Promise {
    pub fn check(self, found: &Result<Found, String>, oracle: &Oracle) -> Result<(), String> {
        let found = found.as_ref().map_err(|e| format!("recovery refuses: {e}"))?;
        let Some(model) = oracle.models.get(&found.last).or_else(|| oracle.in_doubt.get(&found.last)) else {
            return Err(format!("it ends at revision {}, in the middle of a record", found.last));
        };
        if found.last < self.floor {
            return Err(format!("it ends at revision {}, {} was promised", found.last, self.floor));
        }
        if found.model != *model {
            return Err(format!("at revision {} it shows\n{:?}\nrather than\n{model:?}", found.last, found.model));
        }
        for (first, record) in &found.records {
            let told = oracle.records.get(first);
            let is_in_doubt = *first > oracle.newest().0;
            if told != Some(record) && !is_in_doubt {
                return Err(format!("a stream is told\n{record}\nrather than\n{told:?}"));
            }
        }
        if found.head < self.seen {
            return Err(format!("revisions after {} are given out, {} was seen", found.head, self.seen));
        }
        if !found.is_clean {
            return Err("there is something behind the end of the log".into());
        }
        if !found.is_gap_known {
            return Err(format!("revisions from {} to {} are gone, and nobody is told", found.last, found.head));
        }
        Ok(())
    }
}

/// Writes go on after a recovery, under new revisions, and are there after another.
pub(super) fn check_going_on(image: &Image, dir: &Path, fsync: &str, promise: Promise) -> Result<(), String> {
    image.lay_down(dir);
    let (engine, threads) = Engine::open(&workload::config(dir, fsync)).map_err(|e| e.to_string())?;
    let written = workload::wait(engine.submit(workload::put("after"))).map_err(|e| e.to_string());
    let written = written.map(|committed| committed.first_revision.0);
    drop(engine);
    workload::stop(threads);
    let written = written?;
    if written <= promise.seen {
        return Err(format!("revision {written} is given out again, {} was seen", promise.seen));
    }
    let recovered = workload::recovered(dir).map_err(|e| e.to_string())?;
    let entry = recovered.state.get("after", 0).map(|entry| entry.revision.0);
    if entry != Some(written) {
        return Err(format!("revision {written}, written after the recovery, became {entry:?}"));
    }
    Ok(())
}

/// What was done, and how often.
#[derive(Debug, Default)]
struct Counts {
    cuts: usize,
    images: usize,
    second_cuts: usize,
}

struct Laboratory<'a> {
    settings: Settings,
    bug: Option<Bug>,
    oracle: &'a Oracle,
    dir: &'a Path,
    /// By digest: one image is recovered once.
    found: HashMap<u64, Rc<Result<Found, String>>>,
    counts: Counts,
}

impl Laboratory<'_> {
    fn recover(&mut self, image: &Image) -> Rc<Result<Found, String>> {
        let digest = image.digest();
        if let Some(found) = self.found.get(&digest) {
            return Rc::clone(found);
        }
        self.counts.images += 1;
        image.lay_down(self.dir);
        let found = Rc::new(within(None, self.bug, || look(self.dir)));
        self.found.insert(digest, Rc::clone(&found));
        found
    }

    /// Every cut of the workload; the first promise that is not kept.
    fn cut_everywhere(&mut self, steps: &[Step]) -> Result<(), String> {
        let mut volume = Volume::holding(&Image::default());
        let (mut applied, mut kept, mut answered) = (0, 0, 0);
        let mut answers = self.oracle.answers.iter();
        let is_relaxed = self.settings.fsync != "always";
        let mut random = Random(self.settings.seed);
        for (at, step) in steps.iter().enumerate() {
            volume.apply(step);
            match step {
                Step::Applied(last) => applied = applied.max(*last),
                Step::Kept(revision) => kept = kept.max(*revision),
                Step::Replied => answered = answers.next().copied().unwrap_or(0).max(answered),
                _ => {}
            }
            let seen = applied.max(answered);
            for cut in cuts(&volume, &mut random) {
                self.counts.cuts += 1;
                // A kill of the process leaves everything that was written, in every mode.
                let floor = if is_relaxed && cut != Cut::Everything { kept } else { seen };
                let promise = Promise { floor, seen };
                self.check(&volume.cut(cut), promise).map_err(|e| {
                    let before: Vec<_> = steps[at.saturating_sub(12)..=at].iter().map(brief).collect();
                    format!("{:?}, cut after step {at}, {cut:?}: {e}\n  {}", self.settings, before.join("\n  "))
                })?;
            }
        }
        Ok(())
    }

    fn check(&mut self, image: &Image, promise: Promise) -> Result<(), String> {
        let is_new = !self.found.contains_key(&image.digest());
        let found = self.recover(image);
        promise.check(&found, self.oracle)?;
        if is_new {
            self.cut_recovery(image, promise, found.as_ref().as_ref().map_err(String::clone)?)?;
            within(None, self.bug, || check_going_on(image, self.dir, self.settings.fsync, promise))?;
        }
        Ok(())
    }

    /// The power is cut again while the recovery is at work, and right after it.
    fn cut_recovery(&mut self, image: &Image, promise: Promise, first: &Found) -> Result<(), String> {
        image.lay_down(self.dir);
        let recorder = Recorder::new(self.dir, image, None);
        within(Some(&recorder), self.bug, || workload::recovered(self.dir).map(drop)).map_err(|e| e.to_string())?;
        let steps = recorder.steps();
        let mut volume = Volume::holding(image);
        let mut random = Random(self.settings.seed);
        for (at, step) in steps.iter().enumerate() {
            volume.apply(step);
            // What recovery came to can be seen once it is done.
            let is_done = at + 1 == steps.len();
            let floor = if is_done { first.last.max(promise.floor) } else { promise.floor };
            let seen = if is_done { first.head.max(promise.seen) } else { promise.seen };
            for cut in cuts(&volume, &mut random) {
                self.counts.second_cuts += 1;
                let found = self.recover(&volume.cut(cut));
                Promise { floor, seen }.check(&found, self.oracle).map_err(|e| {
                    let done: Vec<_> = steps[..=at].iter().map(brief).collect();
                    format!("cut again after step {at} of the recovery, {cut:?}: {e}\n    {}", done.join("\n    "))
                })?;
            }
        }
        Ok(())
    }
}

/// The kinds of loss that are tried at a step.
fn cuts(volume: &Volume, random: &mut Random) -> Vec<Cut> {
    let mut cuts = vec![Cut::Synced, Cut::Everything, Cut::BytesOnly, Cut::NamesOnly];
    let torn = volume.torn_bytes();
    if torn > 0 {
        let sectors = (super::volume::SECTOR_BYTES..torn).step_by(super::volume::SECTOR_BYTES);
        let ends = [1, 4, 31, 32, 33, torn / 2, torn - 1].into_iter().filter(|&end| end < torn);
        cuts.extend(sectors.chain(ends).chain([random.below(torn)]).map(Cut::Torn));
    }
    cuts.extend([Cut::Some(random.next()), Cut::Some(random.next())]);
    cuts
}

pub(super) fn brief(step: &Step) -> String {
    match step {
        Step::Write { inode, at, bytes } => format!("Write {} bytes to {inode} at {at}", bytes.len()),
        step => format!("{step:?}"),
    }
}

/// Runs a workload once and cuts it everywhere.
fn cut(settings: Settings, bug: Option<Bug>) -> Result<Counts, String> {
    let (dir, second) = (scratch(), scratch());
    let recorder = Recorder::new(dir.path(), &Image::default(), None);
    let oracle = within(Some(&recorder), bug, || workload::run(dir.path(), settings, &recorder)).unwrap();
    assert!(oracle.rejections.is_empty(), "{:?}", oracle.rejections);
    let second = second.path().join("data");
    let mut laboratory =
        Laboratory { settings, bug, oracle: &oracle, dir: &second, found: HashMap::new(), counts: Counts::default() };
    let steps = recorder.steps();
    laboratory.cut_everywhere(&steps)?;
    println!("{settings:?}: {} steps, {:?}", steps.len(), laboratory.counts);
    Ok(laboratory.counts)
}

fn cut_all(fsync: &'static str) {
    for seed in seeds() {
        let counts = cut(Settings { seed, fsync, waits: true }, None).unwrap_or_else(|e| panic!("{e}"));
        assert!(counts.images > 100, "{counts:?}");
    }
}

#[test]
fn what_was_answered_survives_a_cut_at_every_step() {
    cut_all("always");
}

#[test]
fn a_cut_in_interval_mode_leaves_a_prefix_and_no_revision_comes_back() {
    cut_all("interval");
}

#[test]
fn a_cut_in_never_mode_leaves_a_prefix_and_no_revision_comes_back() {
    cut_all("never");
}

/// The same workload and the same checks, on a program with a bug: they must fail.
#[test]
fn the_checks_of_power_cuts_catch_seeded_bugs() {
    // One of the complaints: which comes first depends on when background threads get on. None stands for any.
    let bugs: [(_, _, &[&str]); 9] = [
        ("skip_fsync", "always", &["inside its header", "was promised"]),
        ("skip_dir_sync", "always", &["missing", "was promised"]),
        ("answer_before_sync", "always", &["was promised"]),
        ("publish_before_durable", "always", &["was promised"]),
        ("reuse_revision", "never", &["are given out"]),
        ("short_replay", "always", &["it shows"]),
        ("split_batch", "always", &["in the middle of a record"]),
        ("keep_torn_tail", "always", &["behind the end of the log"]),
        // Rows that are missing, or others than were written.
        ("skip_rows_sync", "always", &[]),
    ];
    for (name, fsync, complaints) in bugs {
        let bug = Bug::named(name).unwrap();
        let how = cut(Settings { seed: 1, fsync, waits: true }, Some(bug));
        let how = how.expect_err(name);
        let how = how.lines().next().unwrap_or_default();
        let is_expected = complaints.is_empty() || complaints.iter().any(|complaint| how.contains(complaint));
        assert!(is_expected, "{name} is caught by something else: {how}");
        println!("{name}: {how}");
    }
}
