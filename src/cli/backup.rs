//! `backup`, `restore`: the whole database in one file, and back.

use super::output::{Output, Partial};
use super::{Interrupted, ServerFlags, usage};
use crate::client::Download;
use crate::engine::backup::{Contents, ReadError, verify, verify_stream};
use crate::engine::restore::{self, RestoreError, Restored};
use anyhow::{Context, anyhow};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{BufReader, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Flags of `kiss-vdb backup`.
#[derive(Args, Debug)]
#[command(
    after_help = "Writes go on meanwhile; the file holds the state of one revision, the newest when the walk ended. It is checked before it \
gets its name; on its way to stdout it is checked too, so look at the exit code. Without this program:
curl -fo FILE http://127.0.0.1:9917/v1/admin/backup

Examples:
  kiss-vdb backup kiss-$(date +%F).backup
  kiss-vdb backup - | ssh archive 'cat > kiss.backup'"
)]
pub struct BackupArgs {
    /// The file to make; - writes to stdout
    file: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    pub(super) server: ServerFlags,
}

/// `kiss-vdb backup`
pub async fn backup(args: BackupArgs) -> anyhow::Result<()> {
    let target = args.server.target()?;
    let is_stdout = is_stream(&args.file);
    if is_stdout && std::io::stdout().is_terminal() {
        return Err(usage("a backup is nothing for a terminal: send stdout to a file or a program, or name a file"));
    }
    let (bytes, contents) = if is_stdout {
        pass_on(target.download("/v1/admin/backup").await?).await?
    } else {
        let mut file = Partial::create(&args.file, args.force)?;
        let saved = save(target.download("/v1/admin/backup").await?, &mut file).await;
        let checked = verify(file.beside(), |_, _| true);
        if let Err(given_up @ ReadError::GivenUp(_)) = checked {
            // The answer was cut short, and this says why.
            return Err(given_up.into());
        }
        let bytes = saved?;
        let contents = checked?.context("the check was interrupted")?;
        file.finish()?;
        (bytes, contents)
    };
    let Contents { revision, keys, collections, vectors, records } = contents;
    let line = if args.server.json {
        format!(
            "{{\"revision\":{revision},\"keys\":{keys},\"collections\":{collections},\"vectors\":{vectors},\"records\":{records},\"bytes\":{bytes}}}"
        )
    } else {
        format!(
            "{}: revision {revision} · read: {keys} keys · {vectors} vectors in {collections} collections · {records} records written meanwhile · {bytes} bytes, checked",
            if is_stdout { "stdout".into() } else { args.file.display().to_string() }
        )
    };
    if is_stdout {
        // stdout is the backup.
        eprintln!("{line}");
        return Ok(());
    }
    let mut out = Output::new();
    out.line(&line)?;
    Ok(out.flush()?)
}

/// Whether the name means stdin or stdout.
pub(super) fn is_stream(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Into a file; returns how many bytes.
async fn save(mut download: Download, file: &mut Partial) -> anyhow::Result<u64> {
    let bar = bytes_bar(None, "from the server");
    let mut bytes = 0;
    let read = loop {
        let piece = match download.next().await {
            Ok(Some(piece)) => piece,
            Ok(None) => break Ok(bytes),
            Err(error) => break Err(error),
        };
        file.write_all(&piece).with_context(|| format!("cannot write {}", file.beside().display()))?;
        bytes += piece.len() as u64;
        bar.set_position(bytes);
    };
    bar.finish_and_clear();
    file.sync()?;
    read
}

/// To stdout, and past a thread that checks it: what the server gave up half-way ends like any other answer.
async fn pass_on(mut download: Download) -> anyhow::Result<(u64, Contents)> {
    let (reader, mut check) = std::io::pipe().context("cannot make a pipe")?;
    let checker = std::thread::spawn(move || verify_stream("what the server sent", BufReader::new(reader)));
    let bar = bytes_bar(None, "from the server");
    let mut out = std::io::stdout();
    let mut bytes = 0;
    let read = loop {
        let piece = match download.next().await {
            Ok(Some(piece)) => piece,
            Ok(None) => break Ok(bytes),
            Err(error) => break Err(error),
        };
        // Not the quiet end of other commands: whoever took half of it has no backup.
        out.write_all(&piece).map_err(|error| anyhow!("stdout took no more before the backup was whole: {error}"))?;
        if check.write_all(&piece).is_err() {
            // It has seen enough, and says what.
            break Ok(bytes);
        }
        bytes += piece.len() as u64;
        bar.set_position(bytes);
    };
    out.flush()?;
    bar.finish_and_clear();
    drop(check);
    match checker.join().map_err(|_| anyhow::anyhow!("the check failed"))? {
        // The answer was cut short, and this says why.
        Err(given_up @ ReadError::GivenUp(_)) => Err(given_up.into()),
        checked => Ok((read?, checked?)),
    }
}

/// A bar over bytes, or a count of them; invisible where nobody looks.
pub(super) fn bytes_bar(length: Option<u64>, what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match length {
        Some(length) => (ProgressBar::new(length), "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {msg} {eta} left"),
        None => (ProgressBar::new_spinner(), "{spinner} {bytes} {bytes_per_sec} {msg}"),
    };
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Flags of `kiss-vdb restore`.
#[derive(Args, Debug)]
#[command(
    after_help = "Needs no server. The file is checked to its end before anything is written; after a failure DIR is as it was. \
Keys, revisions, deadlines, metadata and vectors are those of the backup; history begins anew. Revisions go on behind \
the next multiple of 2^40: whoever had seen later ones of the original is told by a reset. Graphs are made by the server, in the \
background; searches are right meanwhile.

Examples:
  kiss-vdb restore kiss.backup ./restored && kiss-vdb serve --data-dir ./restored
  ssh archive cat kiss.backup | kiss-vdb restore - ./restored   # kept beside DIR while it is checked"
)]
pub struct RestoreArgs {
    /// The backup; - reads stdin
    file: PathBuf,
    /// The data directory to make: absent or empty
    dir: PathBuf,
}

/// Looked at block by block, so that an interrupted restore leaves nothing.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// `kiss-vdb restore`
pub fn restore(args: &RestoreArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.spawn(async {
        if tokio::signal::ctrl_c().await.is_ok() {
            INTERRUPTED.store(true, Ordering::Relaxed);
        }
    });
    let restored = if is_stream(&args.file) {
        let stdin = std::io::stdin();
        if stdin.is_terminal() {
            return Err(usage("stdin is a terminal: send a backup to it, or name a file"));
        }
        restore_stream(stdin, "stdin", &args.dir)?
    } else if args.file.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        let pipe = std::fs::File::open(&args.file).with_context(|| format!("cannot open {}", args.file.display()))?;
        restore_stream(pipe, &args.file.display().to_string(), &args.dir)?
    } else {
        restore_file(&args.file, &args.dir)?
    };
    let mut out = Output::new();
    out.line(&format!(
        "{}: revision {} · {} keys · {} vectors in {} collections · the next write gets revision {}",
        args.dir.display(),
        restored.revision,
        restored.keys,
        restored.vectors,
        restored.collections,
        restored.next_revision
    ))?;
    Ok(out.flush()?)
}

fn restore_file(file: &Path, dir: &Path) -> anyhow::Result<Restored> {
    let bar = bytes_bar(Some(0), "checked and restored");
    let restored = restore::restore(file, dir, |read, of| {
        bar.set_length(of);
        bar.set_position(read);
        !INTERRUPTED.load(Ordering::Relaxed)
    });
    bar.finish_and_clear();
    match restored {
        Err(RestoreError::Interrupted) => Err(Interrupted.into()),
        other => Ok(other?),
    }
}

/// A restore reads its backup twice, first to check it: what comes but once is kept beside the directory meanwhile.
fn restore_stream(mut stream: impl Read, name: &str, dir: &Path) -> anyhow::Result<Restored> {
    restore::refuse_used(dir)?;
    let beside = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut kept = tempfile::Builder::new()
        .prefix(".kiss-vdb-restore-")
        .tempfile_in(beside)
        .with_context(|| format!("cannot write to {}", beside.display()))?;
    let bar = bytes_bar(None, &format!("from {name}"));
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let read = stream.read(&mut buffer).with_context(|| format!("cannot read {name}"))?;
        if INTERRUPTED.load(Ordering::Relaxed) {
            return Err(Interrupted.into());
        }
        if read == 0 {
            break;
        }
        kept.write_all(&buffer[..read]).with_context(|| format!("cannot write to {}", beside.display()))?;
        bytes += read as u64;
        bar.set_position(bytes);
    }
    bar.finish_and_clear();
    restore_file(kept.path(), dir).map_err(|mut error| {
        // The file it was kept in is gone when this is read.
        if let Some(RestoreError::Read(ReadError::Damaged(damaged))) = error.downcast_mut() {
            damaged.path = name.into();
        }
        error
    })
}
