//! `backup`, `restore`: the whole database in one file, and back.

use super::output::{Output, Partial};
use super::{Interrupted, ServerFlags};
use crate::engine::backup::{Contents, verify};
use crate::engine::restore;
use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Flags of `kiss-vdb backup`.
#[derive(Args, Debug)]
#[command(
    after_help = "Writes go on meanwhile; the file holds the state of one revision, the newest when the walk ended. It is checked before it
gets its name. Without this program: curl -fo FILE http://127.0.0.1:9917/v1/admin/backup

Example:
  kiss-vdb backup /backups/kiss-$(date +%F).backup"
)]
pub struct BackupArgs {
    /// The file to make
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
    let mut file = Partial::create(&args.file, args.force)?;
    let mut download = target.download("/v1/admin/backup").await?;
    let bar = bytes_bar(None, "from the server");
    let mut bytes = 0;
    while let Some(piece) = download.next().await? {
        file.write_all(&piece).with_context(|| format!("cannot write {}", file.beside().display()))?;
        bytes += piece.len() as u64;
        bar.set_position(bytes);
    }
    bar.finish_and_clear();
    file.sync()?;
    let contents = verify(file.beside(), |_, _| true)?.context("the check was interrupted")?;
    file.finish()?;
    let Contents { revision, keys, collections, vectors, records } = contents;
    let mut out = Output::new();
    if args.server.json {
        out.line(&format!(
            "{{\"revision\":{revision},\"keys\":{keys},\"collections\":{collections},\"vectors\":{vectors},\"records\":{records},\"bytes\":{bytes}}}"
        ))?;
    } else {
        out.line(&format!(
            "{}: revision {revision} · {keys} keys · {vectors} vectors in {collections} collections · {records} records written meanwhile · {bytes} bytes, checked",
            args.file.display()
        ))?;
    }
    Ok(out.flush()?)
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
    after_help = "Needs no server. The file is checked to its end before anything is written; after a failure DIR is as it was.
Keys, revisions, deadlines, metadata and vectors are those of the backup; history begins anew. Revisions go on behind
the next multiple of 2^40: whoever had seen later ones of the original is told by a reset. Graphs are made by the server, in the
background; searches are right meanwhile.

Example:
  kiss-vdb restore kiss.backup ./data && kiss-vdb serve --data-dir ./data"
)]
pub struct RestoreArgs {
    /// The backup
    file: PathBuf,
    /// The data directory to make: absent or empty
    dir: PathBuf,
}

/// `kiss-vdb restore`
pub fn restore(args: &RestoreArgs) -> anyhow::Result<()> {
    // Looked at block by block, so that an interrupted restore leaves nothing.
    static INTERRUPTED: AtomicBool = AtomicBool::new(false);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.spawn(async {
        if tokio::signal::ctrl_c().await.is_ok() {
            INTERRUPTED.store(true, Ordering::Relaxed);
        }
    });
    let bar = bytes_bar(Some(0), "checked and restored");
    let restored = restore::restore(&args.file, &args.dir, |read, of| {
        bar.set_length(of);
        bar.set_position(read);
        !INTERRUPTED.load(Ordering::Relaxed)
    });
    bar.finish_and_clear();
    let restored = match restored {
        Err(restore::RestoreError::Interrupted) => return Err(Interrupted.into()),
        other => other?,
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
