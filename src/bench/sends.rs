//! The yardstick for streams: one thread that sends a frame to each of many sockets in turn, and does nothing else.
//!
//! ```text
//! sender ─write─▶ socket 1 … socket N ─▶ one receiving thread ─all there─▶ sender: the next round
//! ```
//!
//! What a stream server adds to this is its own cost; what it takes away, it has coalesced.

use super::load::Tally;
use super::server::{GENERATOR_CORE, SERVER_CORE, pin_to};
use anyhow::{Context, anyhow, ensure};
use rustix::time::{ClockId, clock_gettime};
use std::cell::RefCell;
use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::LocalSet;

/// A frame with a value of 100 bytes is about as long.
const FRAME_BYTES: usize = 250;
/// How often the sender looks whether a round is over.
const LOOK_EVERY: Duration = Duration::from_micros(50);
/// A round that takes longer has lost something.
const ROUND_TIMEOUT: Duration = Duration::from_secs(15);

/// What sender and receiver share.
struct Shared {
    origin: Instant,
    /// When the round began, in nanoseconds since `origin`.
    began: AtomicU64,
    received: AtomicU64,
}

/// Rounds of one frame to each of `sockets`, so many a second, or one after the other where they take longer: when each
/// frame was there, from the beginning of its round, and frames sent a second of the sender's processor time. Pinned, the
/// sender has the server's core and the receiver the generator's, as streams have: on one core both send for less.
pub(super) fn measure(sockets: usize, rounds_per_second: f64, seconds: f64, pin: bool) -> anyhow::Result<(Tally, f64)> {
    ensure!(sockets > 0, "at least one socket");
    let rounds = (rounds_per_second * seconds).ceil().max(1.0) as u64;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let mut pairs = Vec::with_capacity(sockets);
    for _ in 0..sockets {
        let receiver = TcpStream::connect(address).context("cannot connect")?;
        let (sender, _) = listener.accept()?;
        sender.set_nodelay(true)?;
        receiver.set_nonblocking(true)?;
        pairs.push((sender, receiver));
    }
    let (mut senders, receivers): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let shared = Arc::new(Shared { origin: Instant::now(), began: AtomicU64::new(0), received: AtomicU64::new(0) });
    let receiving = {
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || {
            if pin {
                pin_to(GENERATOR_CORE)?;
            }
            receive(receivers, &shared)
        })
    };
    if pin {
        pin_to(SERVER_CORE)?;
    }
    let frame = [b'x'; FRAME_BYTES];
    let start = Instant::now();
    let mut spent = Duration::ZERO;
    for round in 0..rounds {
        let due = start + Duration::from_secs_f64(round as f64 / rounds_per_second);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let began = Instant::now();
        shared.began.store(began.duration_since(shared.origin).as_nanos() as u64, Ordering::Release);
        let before = cpu_time();
        for sender in &mut senders {
            sender.write_all(&frame).context("cannot send")?;
        }
        spent += cpu_time() - before;
        while shared.received.load(Ordering::Acquire) < (round + 1) * sockets as u64 {
            ensure!(began.elapsed() < ROUND_TIMEOUT, "not every frame was received");
            std::thread::sleep(LOOK_EVERY);
        }
    }
    if pin {
        pin_to(GENERATOR_CORE)?;
    }
    // The receivers end with their sockets.
    drop(senders);
    let mut tally = receiving.join().map_err(|_| anyhow!("the receiving thread panicked"))??;
    tally.elapsed = start.elapsed();
    Ok((tally, (rounds * sockets as u64) as f64 / spent.as_secs_f64()))
}

/// Processor time of this thread.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // The casts: neither is ever negative.
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn receive(receivers: Vec<TcpStream>, shared: &Arc<Shared>) -> anyhow::Result<Tally> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tally = Rc::new(RefCell::new(Tally::new()));
    LocalSet::new().block_on(&runtime, async {
        let read = |stream: TcpStream, shared: Arc<Shared>, tally: Rc<RefCell<Tally>>| async move {
            let stream = tokio::net::TcpStream::from_std(stream)?;
            let (mut input, mut bytes) = ([0; 4 * FRAME_BYTES], 0);
            loop {
                stream.readable().await?;
                match stream.try_read(&mut input) {
                    Ok(0) => return anyhow::Ok(()),
                    Ok(read) => bytes += read,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                    Err(error) => return Err(error.into()),
                }
                while bytes >= FRAME_BYTES {
                    bytes -= FRAME_BYTES;
                    let began = shared.origin + Duration::from_nanos(shared.began.load(Ordering::Acquire));
                    tally.borrow_mut().record(began.elapsed());
                    shared.received.fetch_add(1, Ordering::AcqRel);
                }
            }
        };
        let tasks: Vec<_> = receivers
            .into_iter()
            .map(|stream| tokio::task::spawn_local(read(stream, Arc::clone(shared), Rc::clone(&tally))))
            .collect();
        for task in tasks {
            task.await.context("a receiver panicked")??;
        }
        anyhow::Ok(())
    })?;
    let tally = tally.borrow().clone();
    Ok(tally)
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_frame_of_every_round_is_counted() {
        let (tally, per_second) = super::measure(7, 1000.0, 0.01, false).unwrap();
        assert_eq!(tally.latency.len(), 70);
        assert!(per_second > 0.0);
    }
}
