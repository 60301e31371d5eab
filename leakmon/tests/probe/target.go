package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
)

var sink int

//go:noinline
func churnBody(wg *sync.WaitGroup) { wg.Done() }

func churn(n int) {
	var wg sync.WaitGroup
	for i := 0; i < n; {
		k := 1000
		if n-i < k {
			k = n - i
		}
		wg.Add(k)
		for j := 0; j < k; j++ {
			go churnBody(&wg)
		}
		wg.Wait()
		i += k
	}
}

func ping(n int) {
	a, b := make(chan int), make(chan int)
	done := make(chan bool)
	go func() {
		for i := 0; i < n; i++ {
			<-a
			b <- i
		}
		done <- true
	}()
	for i := 0; i < n; i++ {
		a <- i
		<-b
	}
	<-done
}

func slow(n int, d time.Duration) {
	c := make(chan int)
	go func() {
		for i := 0; i < n; i++ {
			time.Sleep(d)
			c <- i
		}
	}()
	for i := 0; i < n; i++ {
		<-c
	}
}

func leak(n int) {
	c := make(chan int)
	for i := 0; i < n; i++ {
		go func() { c <- 1 }()
	}
}

func main() {
	// Some more threads.
	for i := 0; i < 8; i++ {
		go func() {
			for {
				time.Sleep(50 * time.Millisecond)
			}
		}()
	}
	in := bufio.NewScanner(os.Stdin)
	fmt.Println("ready")
	for in.Scan() {
		f := strings.Fields(in.Text())
		var n, ms int
		if len(f) > 1 {
			fmt.Sscan(f[1], &n)
		}
		if len(f) > 2 {
			fmt.Sscan(f[2], &ms)
		}
		t := time.Now()
		switch f[0] {
		case "churn":
			churn(n)
		case "ping":
			ping(n)
		case "slow":
			slow(n, time.Duration(ms)*time.Millisecond)
		case "leak":
			leak(n)
		case "settle":
			// What was woken last goes on, and what has ended is gone.
			time.Sleep(100 * time.Millisecond)
		}
		fmt.Println("done", time.Since(t).Nanoseconds())
	}
}
