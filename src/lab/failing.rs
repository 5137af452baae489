//! Disks that fail: each operation of a workload fails once, in each way it can; then a disk that stays full for a while.
//!
//! What would break: an answer for a write that a failing disk swallowed, a refused write that is there all the same, a start
//! that goes on without what it could not read, a panic, a hang.

use super::power::{Promise, check_going_on, look};
use super::volume::{Cut, Image, Volume};
use super::workload::{self, Model, Oracle, Settings};
use super::{Plan, Recorder, Recording, Step, scratch, seeds, within};
use crate::engine::Engine;
use crate::error::{Error, Rejection};
use crate::faults::Bug;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Runs at a time: they mostly wait.
const AT_A_TIME: usize = 4;

/// How runs ended.
#[derive(Debug, Default)]
struct Counts {
    runs: AtomicUsize,
    refused_starts: AtomicUsize,
    poisoned: AtomicUsize,
    full: AtomicUsize,
    /// Nobody was told anything: a snapshot that is tried again, zeros that are not needed.
    unnoticed: AtomicUsize,
}

fn one_more(count: &AtomicUsize) {
    count.fetch_add(1, Ordering::Relaxed);
}

/// Gives every plan to `run`, some at a time; the first complaint.
fn each(plans: Vec<Plan>, run: impl Fn(Plan) -> Result<(), String> + Sync) -> Result<(), String> {
    let plans = Mutex::new(plans.into_iter());
    let complaint = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while complaint.lock().unwrap().is_none() {
                    let Some(plan) = plans.lock().unwrap().next() else { return };
                    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(plan)));
                    let result = result.unwrap_or_else(|_| Err("a panic".into()));
                    if let Err(what) = result {
                        complaint.lock().unwrap().get_or_insert(format!("{plan:?}: {what}"));
                    }
                }
            });
        }
    });
    complaint.into_inner().unwrap().map_or(Ok(()), Err)
}

/// Every way in which every operation can fail.
fn all_plans(ways: &[usize]) -> Vec<Plan> {
    let ways = ways.iter().enumerate();
    ways.flat_map(|(after, &ways)| (0..ways).map(move |way| Plan::One { after, way })).collect()
}

/// The start was refused by an error that names a file.
fn names_a_file(error: &Error) -> Result<(), String> {
    match error {
        Error::Io { .. } => Ok(()),
        other => Err(format!("a start on a failing disk says {other}")),
    }
}

/// What must be there after a run, whatever was lost with the power.
fn check_after(
    settings: Settings,
    recording: &Recording,
    start: &Image,
    oracle: &Oracle,
    dir: &Path,
) -> Result<(), String> {
    let mut volume = Volume::holding(start);
    recording.steps.iter().for_each(|step| volume.apply(step));
    let kept = recording.steps.iter().filter_map(|step| if let Step::Kept(at) = step { Some(*at) } else { None });
    let kept = kept.max().unwrap_or(0);
    let newest = oracle.newest().0;
    for cut in [Cut::Everything, Cut::Synced, Cut::Some(1), Cut::Some(2)] {
        let floor = if settings.fsync != "always" && cut != Cut::Everything { kept } else { newest };
        let promise = Promise { floor, seen: newest };
        let image = volume.cut(cut);
        image.lay_down(dir);
        let found = within(None, None, || look(dir));
        promise.check(&found, oracle).map_err(|e| format!("{cut:?}: {e}"))?;
        if cut == Cut::Everything {
            within(None, None, || check_going_on(&image, dir, settings.fsync, promise))?;
        }
    }
    Ok(())
}

/// The process is started again, and the system was not: what a failed sync left is still to be read, and taken for clean. What
/// is shown and acknowledged on top of that must be there when the power goes.
fn check_started_again(
    settings: Settings,
    recording: &Recording,
    data: &Path,
    oracle: &Oracle,
    dir: &Path,
    bug: Option<Bug>,
) -> Result<(), String> {
    let mut volume = Volume::holding(&Image::default());
    recording.steps.iter().for_each(|step| volume.apply(step));
    let recorder = Recorder::going_on(data, volume, None);
    let (written, mut known) = within(Some(&recorder), bug, || -> Result<_, String> {
        let (engine, threads) = Engine::open(&workload::config(data, settings.fsync)).map_err(|e| e.to_string())?;
        let log = Arc::clone(engine.log());
        let written = workload::wait(engine.submit(workload::put("after"))).map_err(|e| e.to_string());
        let known = workload::history(&log, engine.head()).map_err(|e| e.to_string());
        drop(engine);
        workload::stop(threads);
        Ok((written?.first_revision, known?))
    })?;
    if let Some((first, told)) = oracle.records.iter().find(|(first, told)| {
        known.iter().any(|(at, record)| at == *first && record != *told) && **first <= oracle.newest().0
    }) {
        return Err(format!("started again, {first} is not {told}"));
    }
    let volume = recorder.recording.lock().volume.clone();
    let model = within(None, None, || workload::recovered(data)).map_err(|e| e.to_string())?;
    let model = Model::of(&model.state);
    for cut in [Cut::Synced, Cut::Some(1)] {
        volume.cut(cut).lay_down(dir);
        let recovered = within(None, None, || workload::recovered(dir));
        let recovered = recovered.map_err(|e| format!("started again, then {cut:?}: recovery refuses: {e}"))?;
        let found = workload::history(&recovered.wal.log, recovered.wal.wal.head()).map_err(|e| e.to_string())?;
        // The stop may have shortened the log.
        known.drain(..known.len().saturating_sub(found.len()));
        let after = recovered.state.get("after", 0).map(|entry| entry.revision);
        if found != known || after != Some(written) || Model::of(&recovered.state) != model {
            return Err(format!("started again, then {cut:?}: what was shown is gone"));
        }
    }
    Ok(())
}

fn run(settings: Settings, plan: Plan, bug: Option<Bug>, counts: &Counts) -> Result<(), String> {
    let dir = scratch();
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let recorder = Recorder::new(&data, &Image::default(), Some(plan));
    let ran = within(Some(&recorder), bug, || workload::run(&data, settings, &recorder));
    let recording = recorder.recording.lock();
    one_more(&counts.runs);
    let failed = recording.failed.join("; ");
    if recording.has_panicked {
        return Err(format!("{failed}: a thread ended in a panic"));
    }
    let mut oracle = Oracle::default();
    oracle.models.insert(0, workload::Model::default());
    match ran {
        Err(error) => {
            names_a_file(&error).map_err(|e| format!("{failed}: {e}"))?;
            one_more(&counts.refused_starts);
        }
        Ok(told) => {
            oracle = told;
            let is = |which: fn(&Rejection) -> bool| oracle.rejections.iter().any(which);
            if is(|r| *r == Rejection::Poisoned) {
                // A write without room is undone and refused. Not so a sync, a seal, nor what undoes.
                let is_write = failed.contains("Write of") && !failed.contains("Write of 32 ");
                if matches!(plan, Plan::Full { .. }) || is_write && !failed.contains("Device") {
                    return Err(format!("{failed}: poisoned for want of space"));
                }
                one_more(&counts.poisoned);
            } else if is(|r| matches!(r, Rejection::StorageFull(_)))
                || failed.contains("Files") && is(|r| *r == Rejection::OUT_OF_FILES)
            {
                one_more(&counts.full);
            } else if let Some(other) = oracle.rejections.first() {
                return Err(format!("{failed}: a write is refused with {other}"));
            } else {
                one_more(&counts.unnoticed);
            }
        }
    }
    let second = scratch();
    let second = second.path().join("data");
    check_started_again(settings, &recording, &data, &oracle, &second, bug)
        .and_then(|()| check_after(settings, &recording, &Image::default(), &oracle, &second))
        .map_err(|e| format!("{failed}: {e}"))
}

/// What a run without failures does.
fn ways(settings: Settings) -> Vec<usize> {
    let dir = scratch();
    let recorder = Recorder::new(dir.path(), &Image::default(), None);
    within(Some(&recorder), None, || workload::run(dir.path(), settings, &recorder)).unwrap();
    let recording = recorder.recording.lock();
    recording.ways.clone()
}

fn fail_everywhere(settings: Settings, bug: Option<Bug>) -> Result<Counts, String> {
    let counts = Counts::default();
    each(all_plans(&ways(settings)), |plan| run(settings, plan, bug, &counts))
        .map_err(|e| format!("{settings:?}, {e}"))?;
    println!("{settings:?}: {counts:?}");
    Ok(counts)
}

#[test]
fn every_operation_may_fail_once() {
    // In the second, deletes wait when a new segment's name cannot be synced.
    for seed in 1..seeds().end.max(3) {
        for fsync in ["always", "never"] {
            let settings = Settings { seed, fsync, waits: false };
            let counts = fail_everywhere(settings, None).unwrap_or_else(|e| panic!("{e}"));
            for count in [&counts.refused_starts, &counts.poisoned, &counts.full, &counts.unnoticed] {
                assert!(count.load(Ordering::Relaxed) > 0, "{counts:?}");
            }
        }
    }
}

/// Everything that needs space fails from some operation on, until there is some again.
#[test]
fn a_disk_may_be_full_for_a_while() {
    for seed in seeds() {
        let settings = Settings { seed, fsync: "always", waits: false };
        let counts = Counts::default();
        let ways = ways(settings);
        let plans = (0..ways.len()).step_by(7).map(|after| Plan::Full { after, times: 6 }).collect();
        each(plans, |plan| run(settings, plan, None, &counts)).unwrap_or_else(|e| panic!("{settings:?}, {e}"));
        println!("{settings:?}: {counts:?}");
        assert!(counts.full.load(Ordering::Relaxed) > 0, "{counts:?}");
    }
}

/// A start on what a server left that was killed: refused, naming the file, or complete; and complete the next time.
#[test]
fn a_start_may_fail_anywhere_and_succeeds_later() {
    for (seed, fsync) in seeds().flat_map(|seed| [(seed, "always"), (seed, "never")]) {
        let settings = Settings { seed, fsync, waits: false };
        let dir = scratch();
        let recorder = Recorder::new(dir.path(), &Image::default(), None);
        let oracle = within(Some(&recorder), None, || workload::run(dir.path(), settings, &recorder)).unwrap();
        // Before its orderly stop, so that there is something to replay.
        let steps = recorder.steps();
        let killed = steps.iter().rposition(|step| matches!(step, Step::Replied)).unwrap();
        let mut volume = Volume::holding(&Image::default());
        steps[..=killed].iter().for_each(|step| volume.apply(step));
        let image = volume.cut(Cut::Everything);
        let start = |dir: &Path, plan| {
            image.lay_down(dir);
            let recorder = Recorder::new(dir, &image, plan);
            let result = within(Some(&recorder), None, || workload::recovered(dir).map(drop));
            (result, recorder)
        };
        let second = scratch();
        let data = second.path().join("data");
        let ways = start(&data, None).1.recording.lock().ways.clone();
        let refused = AtomicUsize::new(0);
        let plans = all_plans(&ways);
        let count = plans.len();
        each(plans, |plan| {
            let dir = scratch();
            let data = dir.path().join("data");
            let (result, recorder) = start(&data, Some(plan));
            let recording = recorder.recording.lock();
            let failed = recording.failed.join("; ");
            if let Err(error) = result {
                names_a_file(&error).map_err(|e| format!("{failed}: {e}"))?;
                one_more(&refused);
            }
            check_after(settings, &recording, &image, &oracle, &data).map_err(|e| format!("{failed}: {e}"))
        })
        .unwrap_or_else(|e| panic!("{settings:?}, {e}"));
        println!("{settings:?}: {count} failing starts, {refused:?} refused");
    }
}

#[test]
fn the_checks_of_failing_disks_catch_seeded_bugs() {
    let settings = Settings { seed: 1, fsync: "always", waits: false };
    for bug in ["ignore_failed_sync", "trust_cache"] {
        let how = fail_everywhere(settings, Bug::named(bug)).expect_err(bug);
        println!("{bug}: {}", how.lines().next().unwrap_or_default());
    }
}
