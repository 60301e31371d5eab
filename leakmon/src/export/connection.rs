//! Connections of the HTTP server: how many there are, and how long each may take
//! for what.
//!
//! A connection on which nobody asks for anything gives its place to a new one:
//! whoever opens many and says little keeps nobody else away. Where all of them
//! are being answered, a new one is refused. Both are told so.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;

/// Most bytes of a request's head.
const MAX_HEAD: usize = 16 << 10;

/// Most header lines of a request.
const MAX_HEADERS: usize = 64;

/// How long a client may take for a request's head, and for TLS.
const HEAD_TIME: Duration = Duration::from_secs(5);

/// How long a connection may last in all, however busy.
const CONNECTION_TIME: Duration = Duration::from_secs(600);

/// What a client must take of an answer, in bytes a second, once the time of a
/// request is over.
const SLOWEST: u64 = 1 << 20;

/// What a client is told for which there is no place.
const FULL: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\n\
                    Connection: close\r\nRetry-After: 1\r\n\r\n\
                    there are as many connections as are kept at once: ask again\n";

/// Answers requests for ever, on as many as `most` connections at once.
pub async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    most: usize,
    request_time: Duration,
    router: Router,
) {
    let places = Arc::new(Places {
        taken: Mutex::new(BTreeMap::new()),
        next: AtomicU64::new(0),
    });
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!("accepting a connection: {error}");
                // Out of file descriptors, as a rule.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if !places.make_room(most) {
            refuse(&stream, tls.is_some());
            continue;
        }
        let place = places.take();
        let (tls, router) = (tls.clone(), router.clone());
        tokio::spawn(async move {
            let answered = connection(stream, tls, router, request_time, &place.activity);
            if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_TIME, answered).await {
                tracing::debug!("a connection: {error}");
            }
        });
        // It is looked at before the next one comes, which may take its place.
        tokio::task::yield_now().await;
    }
}

/// Says why, as far as that can be said at once.
fn refuse(stream: &TcpStream, is_tls: bool) {
    // What was not read would make the kernel reset the connection, and the client
    // lose the answer.
    let _ = stream.try_read(&mut [0; 4096]);
    if !is_tls {
        let _ = stream.try_write(FULL.as_bytes());
    }
}

/// The connections that there are, in the order in which they came.
struct Places {
    taken: Mutex<BTreeMap<u64, Arc<Activity>>>,
    next: AtomicU64,
}

/// What is being done on a connection.
#[derive(Debug, Default)]
struct Activity {
    /// A request is being answered.
    answering: AtomicBool,
    /// An answer waits for the client to take it.
    sending: AtomicBool,
    /// Another one has got its place.
    leave: Notify,
}

impl Activity {
    /// Whether nothing is done but wait for a request.
    fn is_waiting(&self) -> bool {
        !self.answering.load(Ordering::Relaxed) && !self.sending.load(Ordering::Relaxed)
    }
}

impl Places {
    fn taken(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Activity>>> {
        // A panic leaves the places as they were.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a place, for which the one that has waited longest may have
    /// to go.
    fn make_room(&self, most: usize) -> bool {
        let mut taken = self.taken();
        if taken.len() < most {
            return true;
        }
        let longest = taken.iter().find(|(_, activity)| activity.is_waiting());
        let Some(id) = longest.map(|(id, _)| *id) else {
            return false;
        };
        if let Some(activity) = taken.remove(&id) {
            activity.leave.notify_one();
        }
        true
    }

    /// A place for a connection.
    fn take(self: &Arc<Self>) -> Place {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let activity = Arc::new(Activity::default());
        self.taken().insert(id, Arc::clone(&activity));
        Place {
            places: Arc::clone(self),
            id,
            activity,
        }
    }
}

/// One connection's place, which it gives back at its end.
struct Place {
    places: Arc<Places>,
    id: u64,
    activity: Arc<Activity>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken().remove(&self.id);
    }
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

async fn connection(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    router: Router,
    request_time: Duration,
    activity: &Arc<Activity>,
) -> Result<(), Failed> {
    let Some(tls) = tls else {
        return talk(stream, router, request_time, activity).await;
    };
    let stream = tokio::select! {
        () = activity.leave.notified() => return Ok(()),
        stream = tokio::time::timeout(HEAD_TIME, tls.accept(stream)) => stream??,
    };
    talk(stream, router, request_time, activity).await
}

async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    router: Router,
    request_time: Duration,
    activity: &Arc<Activity>,
) -> Result<(), Failed> {
    let stream = Paced::new(stream, request_time, Arc::clone(activity));
    let router = TowerToHyperService::new(router);
    let service = service_fn(|request: Request<Incoming>| {
        let answer = router.call(request);
        async {
            activity.answering.store(true, Ordering::Relaxed);
            let answer = answer.await;
            activity.answering.store(false, Ordering::Relaxed);
            answer
        }
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // Nothing has been done on it since it was found waiting.
        biased;
        () = activity.leave.notified() => {
            let mut stream = connection.into_parts().io.into_inner();
            let told = async {
                stream.write_all(FULL.as_bytes()).await?;
                stream.shutdown().await
            };
            tokio::time::timeout(HEAD_TIME, told).await??;
        }
        ended = &mut connection => ended?,
    }
    Ok(())
}

/// A stream whose other end must take what it is sent: within the time that a
/// request may take, and beyond that [`SLOWEST`].
struct Paced<S> {
    stream: S,
    patience: Duration,
    activity: Arc<Activity>,
    /// Since when something waits to be taken, and what has been since then.
    waiting: Option<(Instant, u64)>,
    timer: Pin<Box<Sleep>>,
}

impl<S> Paced<S> {
    fn new(stream: S, patience: Duration, activity: Arc<Activity>) -> Paced<S> {
        Paced {
            stream,
            patience,
            activity,
            waiting: None,
            timer: Box::pin(tokio::time::sleep(patience)),
        }
    }

    fn wait(&mut self, waiting: Option<(Instant, u64)>) {
        self.waiting = waiting;
        self.activity
            .sending
            .store(waiting.is_some(), Ordering::Relaxed);
    }

    /// What came of an attempt to write: the end, when the other end has had its
    /// time.
    fn written(
        &mut self,
        context: &mut Context<'_>,
        outcome: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match (&outcome, self.waiting) {
            (Poll::Ready(Ok(len)), Some((since, taken))) => {
                self.wait(Some((since, taken + *len as u64)));
            }
            (Poll::Ready(_), _) => {}
            (Poll::Pending, waiting) => {
                let (since, taken) = waiting.unwrap_or((Instant::now(), 0));
                self.wait(Some((since, taken)));
                let earned = Duration::from_secs_f64(taken as f64 / SLOWEST as f64);
                self.timer.as_mut().reset(since + self.patience + earned);
                if self.timer.as_mut().poll(context).is_ready() {
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
            }
        }
        outcome
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(context, outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.written(context, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // It is called when all has been written.
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        if flushed.is_ready() {
            self.wait(None);
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
